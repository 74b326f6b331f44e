//! The guest's root file system: an initramfs put together from the programs of the host.
//!
//! A guest needs little: a shell, `fio`, the ext4 tools, the virtio drivers of the host's kernel
//! package and an init that serves commands. All of it is installed on the host already
//! (`scripts/setup`), so it is packed here, with the shared libraries that `ldd` names and the
//! modules that `modules.dep` orders, rather than downloaded or kept in the repository.
//!
//! The archive is plain `newc` cpio without compression, because under TCG the guest unpacks memory
//! faster than it inflates it. It is cached under `target/` by a hash of all inputs; it is written
//! to a temporary file and then renamed, so test processes that build it at the same time do not
//! see halves of each other's work.
//!
//! This file does not know QEMU, nor what the guest is asked to do.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::debian::Debian;

const INIT: &str = include_str!("../initramfs/init");

/// Programs that are copied with the libraries they link; each is looked up in the usual
/// directories.
const PROGRAMS: [&str; 5] = ["fio", "mkfs.ext4", "e2fsck", "tune2fs", "debugfs"];

/// Drivers the guest needs, with hyphens and underscores as in `modules.dep`. Missing ones are
/// built in.
const DRIVERS: [&str; 3] = ["virtio_pci", "virtio_console", "virtio_blk"];

/// How the files of later Debians' modules end.
const COMPRESSED: &str = ".xz";

/// A kernel and the initramfs that belongs to it.
#[derive(Debug, Clone)]
pub struct BootFiles {
    /// The kernel image, as installed.
    pub kernel: PathBuf,
    /// The cached archive.
    pub initramfs: PathBuf,
}

/// Finds the newest cloud kernel of a Debian and the initramfs for it, building the latter if it is
/// not cached.
pub fn boot_files(debian: &Debian, cache_dir: &Path) -> io::Result<BootFiles> {
    let (kernel, modules) = newest_kernel(debian)?;
    let archive = Archive::collect(&modules)?;
    let initramfs = cache_dir.join(format!("guest-initramfs-{:016x}.cpio", archive.fingerprint()?));
    if !initramfs.exists() {
        fs::create_dir_all(cache_dir)?;
        let mut file = tempfile::NamedTempFile::new_in(cache_dir)?;
        let mut out = io::BufWriter::with_capacity(1 << 20, file.as_file_mut());
        archive.write_to(&mut out)?;
        out.flush()?;
        drop(out);
        file.persist(&initramfs)?;
    }
    Ok(BootFiles { kernel, initramfs })
}

/// What a path in the archive stands for.
enum Node {
    Directory,
    Console,
    Link(&'static str),
    Text(String),
    Copy(PathBuf),
    /// The content of a compressed file.
    Unpacked(PathBuf),
}

/// The tree to pack, keyed by the path in the guest without the leading slash.
struct Archive {
    nodes: BTreeMap<String, Node>,
}

impl Archive {
    fn collect(modules: &Path) -> io::Result<Self> {
        let mut archive = Archive { nodes: BTreeMap::new() };
        archive.add("init", Node::Text(INIT.to_owned()));
        archive.add("dev/console", Node::Console);
        archive.add("bin/busybox", Node::Copy(program("busybox")?));
        archive.add("bin/sh", Node::Link("busybox"));
        // mkfs.ext4 reads its defaults from here; without it, it warns and picks others than the
        // host does.
        archive.add("etc/mke2fs.conf", Node::Copy("/etc/mke2fs.conf".into()));
        // Programs ask for the owner of files and for "/etc/mtab" (e2fsck: is it mounted?).
        archive.add("etc/passwd", Node::Text("root:x:0:0:root:/root:/bin/sh\n".to_owned()));
        archive.add("etc/mtab", Node::Link("/proc/mounts"));

        for name in PROGRAMS {
            let path = program(name)?;
            for library in shared_libraries(&path)? {
                archive.add(&guest_path(&library), Node::Copy(library));
            }
            archive.add(&format!("sbin/{name}"), Node::Copy(path));
        }

        let mut order = String::new();
        for module in modules_in_order(modules)? {
            let file = module.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let (name, node) = match file.strip_suffix(COMPRESSED) {
                Some(name) => (name, Node::Unpacked(module)),
                None => (file.as_str(), Node::Copy(module)),
            };
            order.push_str(name);
            order.push('\n');
            archive.add(&format!("lib/modules/{name}"), node);
        }
        archive.add("lib/modules/order", Node::Text(order));
        Ok(archive)
    }

    /// Adds a node and, because the kernel makes no parents, every directory above it.
    fn add(&mut self, path: &str, node: Node) {
        for (at, _) in path.match_indices('/') {
            self.nodes.entry(path[..at].to_owned()).or_insert(Node::Directory);
        }
        self.nodes.insert(path.to_owned(), node);
    }

    /// A hash that changes when a file to be packed was replaced, without reading its bytes.
    fn fingerprint(&self) -> io::Result<u64> {
        let mut hasher = DefaultHasher::new();
        for (path, node) in &self.nodes {
            path.hash(&mut hasher);
            match node {
                Node::Directory | Node::Console => {}
                Node::Link(target) => target.hash(&mut hasher),
                Node::Text(text) => text.hash(&mut hasher),
                Node::Copy(source) | Node::Unpacked(source) => {
                    let meta = fs::metadata(source).map_err(|e| about(source, e))?;
                    (source, meta.len(), meta.mtime(), meta.mtime_nsec()).hash(&mut hasher);
                }
            }
        }
        Ok(hasher.finish())
    }

    fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        for (index, (path, node)) in self.nodes.iter().enumerate() {
            let (mode, bytes) = match node {
                Node::Directory => (0o040755, Vec::new()),
                Node::Console => (0o020600, Vec::new()),
                Node::Link(target) => (0o120777, target.as_bytes().to_vec()),
                Node::Text(text) => (0o100755, text.clone().into_bytes()),
                Node::Copy(source) => (0o100755, fs::read(source).map_err(|e| about(source, e))?),
                Node::Unpacked(source) => (0o100755, unpacked(source)?),
            };
            let device = if matches!(node, Node::Console) { (5, 1) } else { (0, 0) };
            write_entry(out, index as u32 + 1, path, mode, device, &bytes)?;
        }
        write_entry(out, 0, "TRAILER!!!", 0, (0, 0), &[])
    }
}

/// Writes one `newc` entry: header, name and content, each padded to four bytes
/// (Documentation/driver-api/early-userspace/buffer-format.rst in the kernel's sources).
fn write_entry(
    out: &mut impl Write,
    inode: u32,
    path: &str,
    mode: u32,
    (major, minor): (u32, u32),
    bytes: &[u8],
) -> io::Result<()> {
    let size =
        u32::try_from(bytes.len()).map_err(|_| io::Error::other(format!("{path} is too large")))?;
    let name_size = path.len() as u32 + 1;
    let (links, owner, mtime, checksum) = (1, 0, 0, 0);
    write!(
        out,
        "070701{inode:08x}{mode:08x}{owner:08x}{owner:08x}{links:08x}{mtime:08x}{size:08x}"
    )?;
    write!(out, "{:08x}{:08x}{major:08x}{minor:08x}{name_size:08x}{checksum:08x}{path}\0", 0, 0)?;
    let header = 110 + path.len() + 1;
    out.write_all(&[0; 3][..header.next_multiple_of(4) - header])?;
    out.write_all(bytes)?;
    out.write_all(&[0; 3][..bytes.len().next_multiple_of(4) - bytes.len()])
}

/// The image and the modules' directory of the newest `vmlinuz-*-cloud-*` that has its modules.
fn newest_kernel(debian: &Debian) -> io::Result<(PathBuf, PathBuf)> {
    let boot = debian.path("boot");
    let mut best: Option<(Vec<u64>, PathBuf, PathBuf)> = None;
    for entry in fs::read_dir(&boot).map_err(|e| about(&boot, e))? {
        let path = entry?.path();
        let Some(release) =
            path.file_name().and_then(OsStr::to_str).and_then(|n| n.strip_prefix("vmlinuz-"))
        else {
            continue;
        };
        let modules = debian.path("lib/modules").join(release);
        if !release.contains("-cloud-") || !modules.join("modules.dep").exists() {
            continue;
        }
        let numbers = release.split(['.', '-']).filter_map(|part| part.parse().ok()).collect();
        if best.as_ref().is_none_or(|(newest, ..)| numbers > *newest) {
            best = Some((numbers, path, modules));
        }
    }
    best.map(|(_, path, modules)| (path, modules)).ok_or_else(|| {
        io::Error::other(format!(
            "no cloud kernel with modules in {}: run scripts/setup",
            boot.display()
        ))
    })
}

/// The modules behind [`DRIVERS`], each after everything it depends on.
fn modules_in_order(root: &Path) -> io::Result<Vec<PathBuf>> {
    let listing = fs::read_to_string(root.join("modules.dep"))?;
    let mut ordered: Vec<&str> = Vec::new();
    for driver in DRIVERS {
        let Some((module, needs)) =
            listing.lines().filter_map(|line| line.split_once(':')).find(|(path, _)| {
                let file = path.rsplit('/').next().unwrap_or_default();
                file.strip_suffix(COMPRESSED).unwrap_or(file).strip_suffix(".ko") == Some(driver)
            })
        else {
            continue;
        };
        // depmod lists the nearest dependency first, so the farthest one has to be loaded first.
        for path in needs.split_whitespace().rev().chain([module]) {
            if !ordered.contains(&path) {
                ordered.push(path);
            }
        }
    }
    Ok(ordered.into_iter().map(|path| root.join(path)).collect())
}

/// What a module's file holds when it is not compressed: later Debians' are, and the guest's
/// `insmod` takes them as they are.
fn unpacked(module: &Path) -> io::Result<Vec<u8>> {
    let output = Command::new("xz").arg("--decompress").arg("--stdout").arg(module).output();
    let output = output.map_err(|e| about(Path::new("xz"), e))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!("xz cannot unpack {}: {said}", module.display())));
    }
    Ok(output.stdout)
}

/// Where a program is installed on the host; `sbin` is looked at too, since a user's PATH often
/// lacks it.
pub fn program(name: &str) -> io::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/bin", "/bin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(usual)
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| io::Error::other(format!("{name} is not installed: run scripts/setup")))
}

/// Everything the dynamic loader would map for `program`, the loader itself included.
fn shared_libraries(program: &Path) -> io::Result<BTreeSet<PathBuf>> {
    let output = Command::new("ldd").arg(program).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() || text.contains("not found") {
        return Err(io::Error::other(format!("ldd {} says: {text}", program.display())));
    }
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

/// Keeps a library where its host has it, which is where the loader's built-in search path looks.
fn guest_path(library: &Path) -> String {
    library.to_string_lossy().trim_start_matches('/').to_owned()
}

fn about(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_padded_to_four_bytes_after_its_name_and_after_its_content() {
        let mut out = Vec::new();
        write_entry(&mut out, 7, "init", 0o100755, (0, 0), b"hello").unwrap();
        assert_eq!(out.len(), 116 + 8);
        assert!(out.starts_with(b"07070100000007000081ed"));
        assert_eq!(&out[110..116], b"init\0\0"[..].get(..6).unwrap());
        assert_eq!(&out[116..], b"hello\0\0\0");
    }

    #[test]
    fn every_parent_directory_comes_before_what_it_holds() {
        let mut archive = Archive { nodes: BTreeMap::new() };
        archive.add("lib/x86/libc.so", Node::Text(String::new()));
        let paths: Vec<_> = archive.nodes.keys().map(String::as_str).collect();
        assert_eq!(paths, ["lib", "lib/x86", "lib/x86/libc.so"]);
    }
}
