//! Mapping and unmapping, observed from outside: by what the code returns, and in `/proc/self`.
//!
//! The tests count mappings and descriptors of the whole process, so they take turns.

mod common;

use common::{Bench, Recipe, init, mappings, open_fds, value};
use domain_host::{LoadedModule, Residency};
use std::collections::HashSet;
use std::fs::File;
use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

static TURN: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn one_hundred_copies_side_by_side_and_then_none() {
    let _turn = alone();
    let bench = Bench::new();
    bench.build("good", &Recipe { value: 17, ..Recipe::default() });
    assert_eq!(bench.load("good").unload(), Residency::Gone);
    let (fds, maps) = (open_fds(), mappings());
    let loaded: Vec<_> = (0..100).map(|_| bench.load("good")).collect();
    let tables: HashSet<_> = loaded.iter().map(|m| m.vtable()).collect();
    assert_eq!(tables.len(), 100, "two loads share a mapping");
    let names: HashSet<_> =
        mappings().iter().map(|l| l.split("memfd:").nth(1).unwrap().to_owned()).collect();
    assert_eq!(names.len(), 100);
    assert!(loaded.iter().all(|m| value(&**m) == 17));
    for module in loaded {
        assert_eq!(module.unload(), Residency::Gone);
    }
    assert_eq!(mappings(), maps);
    assert_eq!(open_fds(), fds);
}

#[test]
fn the_same_path_with_other_contents_is_another_module() {
    let _turn = alone();
    let bench = Bench::new();
    bench.build("changing", &Recipe { value: 1, ..Recipe::default() });
    let old = bench.load("changing");
    bench.build("changing", &Recipe { value: 2, ..Recipe::default() });
    let new = bench.load("changing");
    assert_eq!((value(&*old), value(&*new)), (1, 2));
    assert_eq!(old.identity().path, new.identity().path);
    assert_ne!(old.identity().sha256, new.identity().sha256);
    // The descriptor number is used again while the other one is mapped.
    assert_eq!(old.unload(), Residency::Gone);
    bench.build("changing", &Recipe { value: 3, ..Recipe::default() });
    let third = bench.load("changing");
    assert_eq!((value(&*new), value(&*third)), (2, 3));
    assert_eq!(new.unload(), Residency::Gone);
    assert_eq!(value(&*third), 3);
    assert_eq!(third.unload(), Residency::Gone);
}

#[test]
fn what_happens_to_the_file_does_not_reach_loaded_code() {
    let _turn = alone();
    let bench = Bench::new();
    let path = bench.build("victim", &Recipe { value: 5, ..Recipe::default() });
    let len = std::fs::metadata(&path).unwrap().len() as usize;
    // Already between the check and the mapping.
    let verified = bench.verify("victim").unwrap();
    File::options().write(true).open(&path).unwrap().write_all(&vec![0xcc; len]).unwrap();
    let module = verified.load().unwrap();
    assert_eq!(value(&*module), 5);
    File::create(&path).unwrap();
    assert_eq!(value(&*module), 5);
    init(&*module);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(value(&*module), 5);
    assert_eq!(module.unload(), Residency::Gone);
}

#[test]
fn nothing_runs_before_load() {
    let _turn = alone();
    let bench = Bench::new();
    let marks = bench.dir.path().join("marks");
    let mark = |c: char| {
        format!(
            "{{ FILE *f = fopen({:?}, \"a\"); fputc('{c}', f); fclose(f); }}",
            marks.to_str().unwrap()
        )
    };
    bench.build(
        "noisy",
        &Recipe::code(&format!(
            "#include <stdio.h>\n__attribute__((constructor)) static void in(void) {}\n\
             __attribute__((destructor)) static void out(void) {}",
            mark('c'),
            mark('d')
        )),
    );
    let seen = || std::fs::read_to_string(&marks).unwrap_or_default();
    let verified = bench.verify("noisy").unwrap();
    assert_eq!(seen(), "");
    let module = verified.load().unwrap();
    assert_eq!(seen(), "c");
    assert_eq!(module.unload(), Residency::Gone);
    assert_eq!(seen(), "cd");
}

#[test]
fn a_lazily_bound_symbol_that_is_missing_fails_the_load() {
    let _turn = alone();
    let bench = Bench::new();
    bench.build(
        "lazy",
        &Recipe {
            args: vec!["-Wl,-z,lazy".into()],
            ..Recipe::code(
                "void nobody_has_this(void);\n#undef INIT\n#define INIT nobody_has_this()",
            )
        },
    );
    let (fds, maps) = (open_fds(), mappings());
    let error = bench.verify("lazy").unwrap().load().err().unwrap();
    assert_eq!(error.code, "module_link_error");
    assert!(error.message.contains("undefined symbol: nobody_has_this"), "{}", error.message);
    assert!(!error.message.contains("/proc/"), "{}", error.message);
    assert_eq!((open_fds(), mappings()), (fds, maps));
}

#[test]
fn modules_that_were_unloaded_last_come_back_as_they_were() {
    let _turn = alone();
    let bench = Bench::new();
    let build = |v: u32| bench.build(&format!("m{v}"), &Recipe { value: v, ..Recipe::default() });
    let names = || -> Vec<_> {
        mappings().iter().map(|l| l.split("memfd:").nth(1).unwrap().to_owned()).collect()
    };
    let load = |name: &str, expected: u32| {
        let module = bench.load(name);
        assert_eq!(value(&*module), expected);
        (names(), module.identity().clone(), module)
    };
    (0..9).for_each(|v| drop(build(v)));
    let (copy, identity, module) = load("m0", 0);
    assert_eq!(module.unload(), Residency::Gone);
    // The same file, and the same bytes under another name.
    std::fs::copy(bench.path("m0"), bench.path("again")).unwrap();
    for name in ["m0", "again"] {
        let (again, known, module) = load(name, 0);
        assert_eq!(again, copy, "the kept copy is mapped again");
        assert_eq!((&known.sha256, &known.build_id), (&identity.sha256, &identity.build_id));
        assert_eq!(known.path, bench.path(name).to_string_lossy());
        // While it is mapped, it is not lent again; nor is more than one kept.
        let fds = open_fds();
        let (both, _, beside) = load(name, 0);
        assert_ne!(both, copy);
        assert_eq!(beside.unload(), Residency::Gone);
        assert_eq!(module.unload(), Residency::Gone);
        assert_eq!(open_fds(), fds);
    }
    // Others beside it; the ninth takes its place.
    (1..8).for_each(|v| assert_eq!(load(&format!("m{v}"), v).2.unload(), Residency::Gone));
    let (again, _, module) = load("m0", 0);
    assert_eq!(again, copy);
    assert_eq!(module.unload(), Residency::Gone);
    (1..9).for_each(|v| assert_eq!(load(&format!("m{v}"), v).2.unload(), Residency::Gone));
    assert_ne!(load("m0", 0).0, copy);
}

#[test]
fn dropping_unmaps_as_well() {
    let _turn = alone();
    let bench = Bench::new();
    bench.build("good", &Recipe::default());
    // What was only looked at is kept, what was loaded and dropped is not.
    drop(bench.verify("good").unwrap());
    let (fds, maps) = (open_fds(), mappings());
    drop(bench.verify("good").unwrap());
    assert_eq!((open_fds(), mappings()), (fds, maps.clone()));
    let module = bench.load("good");
    assert!(mappings().len() > maps.len());
    drop(module);
    assert_eq!((open_fds(), mappings()), (fds - 1, maps));
}

/// Registers a destructor for the calling thread's end, as a `thread_local!` with a `Drop` does.
const PINNING: &str = r"
extern int __cxa_thread_atexit_impl(void (*)(void *), void *, void *);
extern void *__dso_handle;
static void at_end(void *arg) { *(volatile int *)arg = 42; }
static int mark;
#undef INIT
#define INIT __cxa_thread_atexit_impl(at_end, &mark, &__dso_handle)
";

/// Calls `init` on a thread of its own that lives on until the sender is dropped.
fn pin(module: &dyn LoadedModule) -> (mpsc::Sender<()>, std::thread::JoinHandle<()>) {
    // SAFETY: the module is mapped.
    let init = unsafe { (*module.vtable()).init };
    let (alive, end) = mpsc::channel::<()>();
    let (called, wait) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        // SAFETY: the module stays mapped until this thread has run its destructors, which is what
        // is tested.
        unsafe { init() };
        called.send(()).unwrap();
        let _ = end.recv();
    });
    wait.recv().unwrap();
    (alive, thread)
}

#[test]
fn a_module_that_a_live_thread_keeps_is_reported_until_it_is_gone() {
    let _turn = alone();
    let bench = Bench::new();
    let path = bench.build("pinned", &Recipe::code(PINNING));
    bench.build("good", &Recipe::default());
    assert_eq!(bench.load("good").unload(), Residency::Gone);
    let (fds, maps) = (open_fds(), mappings());
    let module = bench.load("pinned");
    let (alive, thread) = pin(&*module);
    let Residency::Resident(left) = module.unload() else { panic!("called gone") };
    let reason = left.reason();
    assert!(reason.contains("thread-local") && reason.contains(path.to_str().unwrap()), "{reason}");
    assert!(!left.is_gone());
    assert!(mappings().len() > maps.len());
    assert_eq!(bench.loader.resident_modules(), [path.to_str().unwrap()]);
    // Others come and go beside it.
    assert_eq!(bench.load("good").unload(), Residency::Gone);
    assert!(bench.loader.resident_modules().len() == 1 && !left.is_gone());
    // The destructor runs in the module's code: it must still be there.
    drop(alive);
    thread.join().unwrap();
    // The linker looks again when something else is closed.
    assert_eq!(bench.load("good").unload(), Residency::Gone);
    assert!(left.is_gone());
    assert_eq!(bench.loader.resident_modules(), [""; 0]);
    assert_eq!((open_fds(), mappings()), (fds, maps));
}

#[test]
fn dropping_a_module_that_must_stay_is_silent_and_safe() {
    let _turn = alone();
    let bench = Bench::new();
    bench.build("pinned", &Recipe::code(PINNING));
    bench.build("good", &Recipe::default());
    let module = bench.load("pinned");
    let (alive, thread) = pin(&*module);
    drop(module);
    assert_eq!(bench.loader.resident_modules().len(), 1);
    drop(alive);
    thread.join().unwrap();
    assert_eq!(bench.load("good").unload(), Residency::Gone);
    assert_eq!(bench.loader.resident_modules(), [""; 0]);
}

#[test]
fn what_stays_mapped_keeps_its_copy_when_the_loader_goes() {
    let _turn = alone();
    let bench = Bench::new();
    bench.build("pinned", &Recipe::code(PINNING));
    let module = bench.load("pinned");
    let (alive, thread) = pin(&*module);
    let (fds, maps) = (open_fds(), mappings());
    assert!(!maps.is_empty());
    drop((module, bench));
    assert_eq!((open_fds(), mappings()), (fds, maps), "a name in the maps leads to another file");
    drop(alive);
    thread.join().unwrap();
    let other = Bench::new();
    other.build("good", &Recipe::default());
    assert_eq!(other.load("good").unload(), Residency::Gone);
    assert_eq!(mappings(), [""; 0]);
}

#[test]
fn threads_can_load_and_unload_at_the_same_time() {
    let _turn = alone();
    let bench = Bench::new();
    for v in 0..4 {
        bench.build(&format!("m{v}"), &Recipe { value: v, ..Recipe::default() });
        assert_eq!(bench.load(&format!("m{v}")).unload(), Residency::Gone);
    }
    let (fds, maps) = (open_fds(), mappings());
    std::thread::scope(|scope| {
        for v in 0..4 {
            let bench = &bench;
            scope.spawn(move || {
                for _ in 0..50 {
                    let module = bench.load(&format!("m{v}"));
                    assert_eq!(value(&*module), v);
                    assert_eq!(module.unload(), Residency::Gone);
                }
            });
        }
    });
    assert_eq!((open_fds(), mappings()), (fds, maps));
}

/// Prints what the steps cost; the limit is far above it, and far below what would hurt.
#[test]
fn a_cycle_is_quick() {
    let _turn = alone();
    let bench = Bench::new();
    // Half a megabyte, as a small Rust module has.
    let ballast = "__attribute__((used)) static const unsigned char ballast[480000] = {1};";
    bench.build("half_a_megabyte", &Recipe::code(ballast));
    let mut times = [const { Vec::new() }; 3];
    for _ in 0..200 {
        let begin = Instant::now();
        let verified = bench.verify("half_a_megabyte").unwrap();
        let checked = Instant::now();
        let module = verified.load().unwrap();
        let mapped = Instant::now();
        assert_eq!(module.unload(), Residency::Gone);
        for (all, time) in
            times.iter_mut().zip([checked - begin, mapped - checked, mapped.elapsed()])
        {
            all.push(time);
        }
    }
    let [verify, load, unload] = times.map(|mut all| {
        all.sort();
        (all[all.len() / 2], all[all.len() * 99 / 100])
    });
    println!("median, p99: verify {verify:?}, load {load:?}, unload {unload:?}");
    assert!(verify.0 + load.0 + unload.0 < Duration::from_millis(50));
}
