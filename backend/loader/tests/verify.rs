//! What is refused, by which code, and that no bytes make the checks panic. Nothing is mapped here.

mod common;

use common::{Bench, Recipe, descriptor_with};
use domain_abi::descriptor::PANIC_ABORT;
use domain_abi::{ENTRY_SYMBOL, ModuleVtable};
use domain_host::ModuleLoader;
use object::{Object, ObjectSection, ObjectSymbol};
use std::collections::BTreeMap;
use std::fs::File;
use std::process::Command;
use std::time::{Duration, Instant};

#[test]
fn a_good_module_is_described_and_identified() {
    let bench = Bench::new();
    let path = bench.build("good", &Recipe::default());
    let verified = bench.verify("good").unwrap();
    assert_eq!(verified.description().name, "testling");
    assert_eq!(verified.description().accepted_schemas, [3, 4]);
    let identity = verified.identity();
    assert_eq!(identity.path, path.to_str().unwrap());
    let sum = Command::new("sha256sum").arg(&path).output().unwrap();
    assert_eq!(identity.sha256, String::from_utf8_lossy(&sum.stdout).split(' ').next().unwrap());
    let notes = Command::new("readelf").arg("-n").arg(&path).output().unwrap();
    let id = identity.build_id.as_deref().unwrap();
    assert_eq!(id.len(), 40);
    assert!(String::from_utf8_lossy(&notes.stdout).contains(&format!("Build ID: {id}")));
    // A path gives the same module as the name.
    let by_path = bench.loader.verify(path.to_str().unwrap()).unwrap();
    assert_eq!(by_path.identity(), identity);
    assert_eq!(bench.loader.names(), ["good"]);
}

#[test]
fn a_module_without_build_id_is_fine() {
    let bench = Bench::new();
    bench.build("anonymous", &Recipe::args(["-Wl,--build-id=none"]));
    assert_eq!(bench.verify("anonymous").unwrap().identity().build_id, None);
}

/// What makes an executable of it.
const MAIN: &str = "int main(void) { return 0; }";

#[test]
fn each_bad_module_is_refused_for_its_own_reason() {
    let bench = Bench::new();
    let unique = ".pushsection .data\n.globl u\n.type u,%gnu_unique_object\n.size u,8\nu: .quad 1\n.popsection";
    let text_relocation = ".pushsection .text\n.balign 8\n.quad hotswap_domain_module\n.popsection";
    let asm = |lines: &str| Recipe::code(&format!("__asm__({lines:?});"));
    let extra = bench.dir.path().join("libextra.so");
    Recipe { args: vec!["-Wl,-soname,libextra.so".into()], ..Recipe::default() }.build(&extra);
    let size = ModuleVtable::FIRST_SIZE;
    let bad: Vec<(&str, &str, Recipe)> = vec![
        ("module_no_descriptor", "no section", Recipe { descriptor: None, ..Recipe::default() }),
        (
            "module_no_descriptor",
            "magic",
            Recipe { descriptor: descriptor_with(0, 0), ..Recipe::default() },
        ),
        (
            "module_wrong_abi",
            "ABI 7",
            Recipe { descriptor: descriptor_with(20, 7), ..Recipe::default() },
        ),
        (
            "module_wrong_abi",
            "bytes",
            Recipe { descriptor: descriptor_with(16, 40), ..Recipe::default() },
        ),
        (
            "module_wrong_class",
            "class 9",
            Recipe { descriptor: descriptor_with(24, 9), ..Recipe::default() },
        ),
        (
            "module_panic_abort",
            "panic=unwind",
            Recipe { descriptor: descriptor_with(28, PANIC_ABORT), ..Recipe::default() },
        ),
        (
            "module_bad_descriptor",
            "`name`",
            Recipe { descriptor: descriptor_with(32, 0x4141_4141), ..Recipe::default() },
        ),
        ("module_no_entry", "export", Recipe { linkage: "static", ..Recipe::default() }),
        (
            "module_no_entry",
            "export",
            Recipe { linkage: "__attribute__((visibility(\"hidden\")))", ..Recipe::default() },
        ),
        ("module_wrong_abi", "shorter", Recipe { functions: 5, ..Recipe::default() }),
        ("module_wrong_abi", "ABI", Recipe { table_abi: 2, ..Recipe::default() }),
        ("module_wrong_abi", "size", Recipe { table_size: size + 8, ..Recipe::default() }),
        ("module_wrong_abi", "size", Recipe { table_size: size - 8, ..Recipe::default() }),
        ("module_search_path", "RUNPATH", Recipe::args(["-Wl,--enable-new-dtags,-rpath,/tmp"])),
        ("module_search_path", "DT_RPATH", Recipe::args(["-Wl,--disable-new-dtags,-rpath,/tmp"])),
        (
            "module_needs_library",
            "libextra.so",
            Recipe::args(["-Wl,--no-as-needed", extra.to_str().unwrap()]),
        ),
        ("module_needs_library", "libfilter", Recipe::args(["-Wl,-F,libfilter.so"])),
        ("module_needs_library", "libaux", Recipe::args(["-Wl,-f,libaux.so"])),
        ("module_not_unloadable", "nodelete", Recipe::args(["-Wl,-z,nodelete"])),
        ("module_not_unloadable", "unique", asm(unique)),
        ("module_not_unloadable", "libm.so.6", Recipe::args(["-Wl,-soname,libm.so.6"])),
        (
            "module_text_relocations",
            "-fPIC",
            Recipe { args: vec!["-Wl,-z,notext".into()], ..asm(text_relocation) },
        ),
        ("module_executable_stack", "noexecstack", Recipe::args(["-Wl,-z,execstack"])),
        ("module_not_shared", "object file", Recipe { kind: "-c", ..Recipe::default() }),
        ("module_not_shared", "an executable", Recipe { kind: "-no-pie", ..Recipe::code(MAIN) }),
        (
            "module_not_shared",
            "position-independent",
            Recipe { kind: "-pie", ..Recipe::code(MAIN) },
        ),
    ];
    let mut built = 0;
    for (code, part, recipe) in bad {
        built += 1;
        let name = format!("bad{built}");
        // -r contradicts -shared; it is compiled only.
        let recipe = if recipe.args.first().is_some_and(|a| a == "-r") {
            Recipe::args(["-c"])
        } else {
            recipe
        };
        bench.build(&name, &recipe);
        let error = bench.refusal(&name);
        assert_eq!(error.code, code, "{}", error.message);
        assert!(error.message.contains(part), "no `{part}` in: {}", error.message);
        assert!(error.message.contains(bench.path(&name).to_str().unwrap()), "{}", error.message);
        assert!(error.message.contains(';'), "does not say what to do: {}", error.message);
    }
}

#[test]
fn what_is_no_regular_file_is_refused_at_once() {
    let bench = Bench::new();
    let begin = Instant::now();
    assert!(Command::new("mkfifo").arg(bench.path("fifo")).status().unwrap().success());
    let _socket = std::os::unix::net::UnixListener::bind(bench.path("socket")).unwrap();
    std::fs::create_dir(bench.path("directory")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", bench.path("device")).unwrap();
    for (name, part) in [
        ("fifo", "a FIFO"),
        ("socket", "a socket"),
        ("directory", "a directory"),
        ("device", "a device"),
    ] {
        let error = bench.refusal(name);
        assert_eq!(error.code, "module_unreadable", "{}", error.message);
        assert!(error.message.contains(part), "{}", error.message);
    }
    assert!(begin.elapsed() < Duration::from_secs(5), "it waited");
}

#[test]
fn files_that_are_no_modules_are_refused() {
    let bench = Bench::new();
    bench.write("empty", b"");
    bench.write("text", b"#!/bin/sh\necho hello\n");
    bench.write("magic", b"\x7fELF");
    File::create(bench.path("huge")).unwrap().set_len(1 << 33).unwrap();
    // As large as allowed, but all zeros.
    File::create(bench.path("zeros")).unwrap().set_len(64 << 20).unwrap();
    std::os::unix::fs::symlink("nowhere", bench.path("dangling")).unwrap();
    for (name, code) in [
        ("empty", "module_not_elf"),
        ("text", "module_not_elf"),
        ("magic", "module_malformed"),
        ("huge", "module_too_large"),
        ("zeros", "module_not_elf"),
        ("dangling", "module_not_found"),
        ("/nonexistent/libdomain_x.so", "module_not_found"),
        ("/etc/passwd/libdomain_x.so", "module_not_found"),
    ] {
        let error = bench.refusal(name);
        assert_eq!(error.code, code, "{}", error.message);
    }
}

#[test]
fn a_wrong_name_is_an_error_that_lists_the_right_ones() {
    let bench = Bench::new();
    let error = bench.refusal("ramdisk");
    assert_eq!(error.code, "module_not_found");
    assert!(error.message.contains("no modules at all"), "{}", error.message);
    bench.build("empty", &Recipe::default());
    bench.write("file", b"not even a module");
    let error = bench.refusal("ramdsk");
    assert_eq!(error.code, "module_not_found");
    assert!(
        error.message.contains("`ramdsk`") && error.message.contains("empty, file"),
        "{}",
        error.message
    );
}

#[test]
fn an_unfit_module_in_the_first_directory_is_not_replaced_by_one_in_the_second() {
    let (first, second) = (Bench::new(), Bench::new());
    first.write("same", b"junk");
    second.build("same", &Recipe::default());
    let dirs = [&first, &second].map(|b| b.dir.path().to_owned()).to_vec();
    let loader = loader::FileLoader::new(dirs);
    assert_eq!(loader.verify("same").err().unwrap().code, "module_not_elf");
    std::fs::remove_file(first.path("same")).unwrap();
    loader.verify("same").unwrap();
}

/// Writes `bytes` at `at` in a good module.
fn patched(bench: &Bench, at: usize, bytes: &[u8]) -> &'static str {
    let mut whole = std::fs::read(bench.path("good")).unwrap();
    whole[at..at + bytes.len()].copy_from_slice(bytes);
    bench.write("patched", &whole);
    bench.refusal("patched").code
}

#[test]
fn foreign_headers_are_refused() {
    let bench = Bench::new();
    bench.build("good", &Recipe::default());
    let other = if cfg!(target_arch = "x86_64") { 183_u16 } else { 62 };
    assert_eq!(patched(&bench, 18, &other.to_le_bytes()), "module_wrong_machine");
    assert_eq!(patched(&bench, 4, &[1]), "module_wrong_machine");
    assert_eq!(patched(&bench, 5, &[2]), "module_wrong_machine");
    assert_eq!(patched(&bench, 16, &2_u16.to_le_bytes()), "module_not_shared");
    assert_eq!(patched(&bench, 16, &1_u16.to_le_bytes()), "module_not_shared");
    // e_shoff, e_shnum, e_phnum, e_phentsize.
    assert_eq!(patched(&bench, 40, &u64::MAX.to_le_bytes()), "module_malformed");
    assert_eq!(patched(&bench, 60, &u16::MAX.to_le_bytes()), "module_malformed");
    assert_eq!(patched(&bench, 56, &u16::MAX.to_le_bytes()), "module_malformed");
    assert_eq!(patched(&bench, 54, &7_u16.to_le_bytes()), "module_malformed");
}

#[test]
fn segments_that_would_hurt_the_linker_are_refused() {
    let bench = Bench::new();
    bench.build("good", &Recipe::default());
    let whole = std::fs::read(bench.path("good")).unwrap();
    let number = |at: usize, len: usize| {
        whole[at..at + len].iter().rev().fold(0_usize, |all, &byte| all << 8 | usize::from(byte))
    };
    let headers: Vec<usize> = (0..number(56, 2)).map(|i| number(32, 8) + i * 56).collect();
    let of_kind = |kind| headers.iter().copied().filter(move |&at| number(at, 4) == kind);
    let (first, last) = (of_kind(1).next().unwrap(), of_kind(1).next_back().unwrap());
    // Code behind the file's end would be SIGBUS at its first run.
    let code = of_kind(1).find(|&at| number(at + 4, 4) & 1 == 1).unwrap();
    assert_eq!(patched(&bench, code + 8, &(1_u64 << 40).to_le_bytes()), "module_malformed");
    assert_eq!(patched(&bench, code + 8, &u64::MAX.to_le_bytes()), "module_malformed");
    // More in the file than in memory; more in memory than there is room for.
    for field in [32, 40] {
        assert_eq!(
            patched(&bench, first + field, &(1_u64 << 40).to_le_bytes()),
            "module_malformed"
        );
    }
    // The last one below the first: the linker would map over what is there.
    assert_eq!(patched(&bench, last + 16, &0_u64.to_le_bytes()), "module_malformed");
    assert_eq!(patched(&bench, last + 16, &u64::MAX.to_le_bytes()), "module_malformed");
    // No stack header: the linker then assumes an executable stack.
    let stack = of_kind(0x6474_e551).next().unwrap();
    assert_eq!(patched(&bench, stack, &0x6000_0000_u32.to_le_bytes()), "module_executable_stack");
    // No dynamic segment, or one that is not loaded.
    let dynamic = of_kind(2).next().unwrap();
    assert_eq!(patched(&bench, dynamic, &0x6000_0000_u32.to_le_bytes()), "module_malformed");
    assert_eq!(patched(&bench, dynamic + 16, &(1_u64 << 40).to_le_bytes()), "module_malformed");
}

#[test]
fn symbols_that_the_linker_would_see_otherwise_are_refused() {
    let bench = Bench::new();
    let whole = std::fs::read(bench.build("good", &Recipe::default())).unwrap();
    let file = object::read::elf::ElfFile64::<object::LittleEndian>::parse(&*whole).unwrap();
    let entry = file.dynamic_symbols().find(|s| s.name() == Ok(ENTRY_SYMBOL)).unwrap();
    let section = file.section_by_name(".dynsym").unwrap();
    let symbol = section.file_range().unwrap().0 as usize + entry.index().0 * 24;
    // st_info: a local object, a function that the lookup would call, a thread-local.
    for info in [0x01, 0x1a, 0x16] {
        assert_eq!(patched(&bench, symbol + 4, &[info]), "module_no_entry", "{info:#x}");
    }
    // st_shndx: undefined, absolute.
    for index in [0_u16, 0xfff1] {
        assert_eq!(patched(&bench, symbol + 6, &index.to_le_bytes()), "module_no_entry");
    }
    // st_value: not aligned, not in the file. st_size: reaches out of its segment.
    assert_eq!(
        patched(&bench, symbol + 8, &(entry.address() + 1).to_le_bytes()),
        "module_malformed"
    );
    assert_eq!(patched(&bench, symbol + 8, &(1_u64 << 40).to_le_bytes()), "module_malformed");
    assert_eq!(patched(&bench, symbol + 16, &(1_u64 << 40).to_le_bytes()), "module_malformed");
    // sh_addr: the section's symbols are not the ones that the linker uses.
    let headers = u64::from_le_bytes(whole[40..48].try_into().unwrap()) as usize;
    let header = headers + section.index().0 * 64;
    assert_eq!(
        patched(&bench, header + 16, &(section.address() + 24).to_le_bytes()),
        "module_malformed"
    );
}

#[test]
fn every_truncation_is_refused() {
    let bench = Bench::new();
    let whole = std::fs::read(bench.build("good", &Recipe::default())).unwrap();
    bench.write("cut", &whole);
    bench.verify("cut").unwrap();
    // Each length in the headers, and each seventh elsewhere; a file can only be made shorter.
    for len in
        (0..whole.len()).rev().filter(|len| *len < 1024 || len % 7 == 0 || len + 64 > whole.len())
    {
        File::options().write(true).open(bench.path("cut")).unwrap().set_len(len as u64).unwrap();
        let error = bench.refusal("cut");
        assert!(
            ["module_not_elf", "module_malformed"].contains(&error.code),
            "{len} bytes: {error:?}"
        );
    }
}

/// xorshift64*: the same flips in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }
}

#[test]
fn no_flipped_bytes_make_it_panic() {
    let bench = Bench::new();
    let whole = std::fs::read(bench.build("good", &Recipe::default())).unwrap();
    let sections = u64::from_le_bytes(whole[40..48].try_into().unwrap()) as usize;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut results = BTreeMap::<&str, u32>::new();
    for _ in 0..6000 {
        let mut bytes = whole.clone();
        for _ in 0..=random.below(4) {
            // Half of them in the headers, where they hurt.
            let at = match random.below(4) {
                0 => random.below(64 + 11 * 56),
                1 => sections + random.below(whole.len() - sections),
                _ => random.below(whole.len()),
            };
            let values = [0, 1, 0x7f, 0x80, 0xff, random.below(256) as u8];
            bytes[at] = values[random.below(values.len())];
        }
        bench.write("flipped", &bytes);
        *results.entry(bench.verify("flipped").map_or_else(|e| e.code, |_| "fine")).or_default() +=
            1;
    }
    // If they did not get past the first check, they would show nothing.
    assert!(
        results.len() >= 8 && results["fine"] > 100 && results["module_malformed"] > 500,
        "{results:?}"
    );
}

#[test]
fn which_libraries_are_allowed_is_the_loaders_policy() {
    let bench = Bench::new();
    let needs_libm = Recipe::args(["-Wl,--no-as-needed", "-lm"]);
    bench.build("needs_libm", &needs_libm);
    let dirs = vec![bench.dir.path().to_owned()];
    let refused = |libraries: &[&str]| {
        let libraries = libraries.iter().map(|library| (*library).to_owned()).collect();
        let loader = loader::FileLoader::with_policy(
            dirs.clone(),
            loader::Policy { libraries, ..loader::Policy::default() },
        );
        loader.verify("needs_libm").err().map(|error| (error.code, error.message))
    };
    assert_eq!(refused(&["libm.so.6", "libc.so.6"]), None);
    let (code, message) = refused(&["libc.so.6"]).expect("libm is not allowed");
    assert_eq!(code, "module_needs_library");
    assert!(message.contains("`libm.so.6`"), "{message}");
    // Another loader's copy of the same module does not count.
    assert!(bench.verify("needs_libm").is_ok());
    assert!(refused(&["libc.so.6"]).is_some());
}
