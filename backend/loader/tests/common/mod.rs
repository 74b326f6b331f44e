//! Small modules in C, good and bad ones, made to measure.
//!
//! C because it is compiled in 50 ms, and because each fault can be put in on purpose, which no
//! Rust build would let us do.

// Each test program uses its own part of this.
#![allow(dead_code)]

use domain_abi::descriptor::Descriptor;
use domain_abi::{ABI_VERSION, ModuleVtable};
use domain_host::{LoadError, LoadedModule, ModuleLoader, VerifiedModule};
use loader::FileLoader;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Functions in the table: of a module that is as old as can be.
const FUNCTIONS: usize = (ModuleVtable::FIRST_SIZE - 8) / size_of::<usize>();

/// The recipe of a module. The default is a good one.
pub struct Recipe {
    /// Bytes of the descriptor; `None` leaves the section out.
    pub descriptor: Option<Vec<u8>>,
    /// C in front of the table; `INIT` can be defined to what `init` does.
    pub code: String,
    /// What `set_write_cache` returns.
    pub value: u32,
    /// `size` in the table.
    pub table_size: usize,
    /// `abi_version` in the table.
    pub table_abi: u32,
    /// Functions that the table really has.
    pub functions: usize,
    /// Put before the table's declaration, e.g. `static`.
    pub linkage: &'static str,
    /// What is made: `-shared`, `-pie`, `-no-pie` or `-c`.
    pub kind: &'static str,
    /// Further arguments of the compiler.
    pub args: Vec<String>,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            descriptor: Some(descriptor()),
            code: String::new(),
            value: 1,
            table_size: ModuleVtable::FIRST_SIZE,
            table_abi: ABI_VERSION,
            functions: FUNCTIONS,
            linkage: "",
            kind: "-shared",
            args: Vec::new(),
        }
    }
}

/// The bytes of a good descriptor.
pub fn descriptor() -> Vec<u8> {
    let descriptor =
        Descriptor::new("testling", "1.2.3", "testling", 4, &[3, 4], &["size"], &["size"]);
    // SAFETY: `Descriptor` is `repr(C)` of integers and byte arrays whose sizes are multiples of 4:
    // no padding.
    unsafe {
        std::slice::from_raw_parts((&raw const descriptor).cast::<u8>(), size_of::<Descriptor>())
            .to_vec()
    }
}

/// A good descriptor with another integer at `at`.
pub fn descriptor_with(at: usize, value: u32) -> Option<Vec<u8>> {
    let mut bytes = descriptor();
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    Some(bytes)
}

impl Recipe {
    /// A module that differs in its code.
    pub fn code(code: &str) -> Self {
        Self { code: code.to_owned(), ..Self::default() }
    }

    /// A module that differs in how it is compiled or linked.
    pub fn args<const N: usize>(args: [&str; N]) -> Self {
        Self { args: args.map(str::to_owned).to_vec(), ..Self::default() }
    }

    fn source(&self) -> String {
        let Self { code, value, table_size, table_abi, functions, linkage, .. } = self;
        let section = self.descriptor.as_ref().map_or_else(String::new, |bytes| {
            let list: Vec<_> = bytes.iter().map(u8::to_string).collect();
            format!(
                "__attribute__((section(\".hotswap.domain\"), used)) static const unsigned char descriptor[] = {{{}}};",
                list.join(",")
            )
        });
        // In the table: init, fini, ..., set_write_cache.
        let middle = "nothing,".repeat(functions.saturating_sub(2));
        format!(
            r"
#include <stdint.h>
#define INIT
{code}
static void init(void) {{ INIT; }}
static void nothing(void) {{}}
static uint32_t value(void) {{ return {value}; }}
{section}
struct table {{ uint32_t size, abi_version; void *functions[{functions}]; }};
{linkage} const struct table hotswap_domain_module
    __attribute__((used)) = {{ {table_size}, {table_abi}, {{ init, {middle} value }} }};
"
        )
    }

    /// Compiles it to `path`.
    pub fn build(&self, path: &Path) {
        let source = path.with_extension("c");
        std::fs::write(&source, self.source()).unwrap();
        let output = Command::new("cc")
            .args([
                self.kind,
                "-fPIC",
                "-O1",
                "-w",
                "-Wl,--build-id=sha1",
                "-Wl,-z,noexecstack",
                "-o",
            ])
            .arg(path)
            .arg(&source)
            .args(&self.args)
            .output()
            .expect("these tests need a C compiler, as Rust's linker does");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// A directory with modules, and a loader that looks into it.
pub struct Bench {
    /// The directory.
    pub dir: tempfile::TempDir,
    /// The loader.
    pub loader: FileLoader,
}

impl Bench {
    /// An empty directory.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let loader = FileLoader::new(vec![dir.path().to_owned()]);
        Self { dir, loader }
    }

    /// Where the module of that name is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("libdomain_{name}.so"))
    }

    /// Builds a module under that name.
    pub fn build(&self, name: &str, recipe: &Recipe) -> PathBuf {
        let path = self.path(name);
        recipe.build(&path);
        path
    }

    /// A module of that name with the given bytes.
    pub fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    /// Checks the module of that name.
    pub fn verify(&self, name: &str) -> Result<Box<dyn VerifiedModule>, LoadError> {
        self.loader.verify(name)
    }

    /// The refusal of the module of that name.
    pub fn refusal(&self, name: &str) -> LoadError {
        match self.verify(name) {
            Ok(_) => panic!("`{name}` was not refused"),
            Err(error) => error,
        }
    }

    /// Checks and maps the module of that name.
    pub fn load(&self, name: &str) -> Box<dyn LoadedModule> {
        self.verify(name).unwrap().load().unwrap()
    }
}

/// The module's own number, by running its code.
pub fn value(module: &dyn LoadedModule) -> u32 {
    // SAFETY: the module is mapped, and its function (`value` in the C source) takes what it is
    // given and looks at none of it.
    unsafe { ((*module.vtable()).set_write_cache)(std::ptr::null_mut(), 0, std::ptr::null_mut()) }
}

/// Calls the module's `init`.
pub fn init(module: &dyn LoadedModule) {
    // SAFETY: the module is mapped, and its `init` expects nothing.
    unsafe { ((*module.vtable()).init)() }
}

/// Lines of `/proc/self/maps` that belong to modules.
pub fn mappings() -> Vec<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|l| l.contains("/memfd:hotswap-module-")).map(str::to_owned).collect()
}

/// Open file descriptors of this process.
pub fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
