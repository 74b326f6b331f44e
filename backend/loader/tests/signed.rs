//! Signatures: what is verified is what is loaded, also when a file is exchanged meanwhile.

mod common;

use common::{Bench, Recipe, value};
use domain_host::{Identity, ModuleLoader};
use loader::{FileLoader, Policy, TrustedKey};
use minisign::KeyPair;
use std::fs::{self, Permissions};
use std::io::Cursor;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

fn keys() -> KeyPair {
    KeyPair::generate_unencrypted_keypair().unwrap()
}

fn loader(dir: &Path, keys: &[&KeyPair]) -> FileLoader {
    let key = |keys: &&KeyPair| TrustedKey::parse(&keys.pk.to_base64()).unwrap();
    let trusted_keys = keys.iter().map(key).collect();
    let policy = Policy { trusted_keys, ..Policy::default() };
    FileLoader::with_policy(vec![dir.to_owned()], policy)
}

fn signature(keys: &KeyPair, bytes: &[u8]) -> String {
    minisign::sign(None, &keys.sk, Cursor::new(bytes), None, None).unwrap().into_string()
}

fn beside(path: &Path) -> PathBuf {
    PathBuf::from(format!("{}.minisig", path.display()))
}

fn sign(keys: &KeyPair, path: &Path) {
    fs::write(beside(path), signature(keys, &fs::read(path).unwrap())).unwrap();
}

fn code(loader: &FileLoader, name: &str) -> Option<&'static str> {
    loader.verify(name).err().map(|error| error.code)
}

#[test]
fn any_of_the_keys_is_enough_and_no_other() {
    let bench = Bench::new();
    let path = bench.build("one", &Recipe::default());
    let (one, two, three) = (keys(), keys(), keys());
    let loader = loader(bench.dir.path(), &[&one, &two]);
    assert_eq!(code(&loader, "one"), Some("module_unsigned"));
    for (keys, expected) in [(&one, None), (&two, None), (&three, Some("module_untrusted"))] {
        sign(keys, &path);
        assert_eq!(code(&loader, "one"), expected);
        // What was verified once is in the cache now; its signature is looked at anew.
        assert_eq!(code(&loader, "one"), expected);
    }
    fs::remove_file(beside(&path)).unwrap();
    assert_eq!(code(&loader, "one"), Some("module_unsigned"));
    assert!(bench.verify("one").is_ok(), "a loader without keys does not ask");
}

#[test]
fn signatures_that_are_none_are_told_apart() {
    let bench = Bench::new();
    let path = bench.build("one", &Recipe::default());
    let keys = keys();
    let loader = loader(bench.dir.path(), &[&keys]);
    sign(&keys, &path);
    let good = fs::read_to_string(beside(&path)).unwrap();
    let lines: Vec<&str> = good.lines().collect();
    let of = |lines: [&str; 4]| lines.join("\n");
    let cut = &lines[1][..40];
    // Of the kind that signs the bytes themselves: only the second letter of its kind differs.
    let legacy = lines[1].replacen("RU", "RW", 1);
    for (text, expected) in [
        (good.clone(), None),
        (good.replace('\n', "\r\n"), None),
        (String::new(), Some("module_bad_signature")),
        ("\u{fc}".repeat(3000), Some("module_bad_signature")),
        (of([lines[0], cut, lines[2], lines[3]]), Some("module_bad_signature")),
        (of([lines[0], lines[1], "trusted", lines[3]]), Some("module_bad_signature")),
        (of([lines[0], lines[1], "trusted comment: x", lines[3]]), Some("module_altered")),
        (of([lines[0], &legacy, lines[2], lines[3]]), Some("module_bad_signature")),
        (of(["untrusted comment: other", lines[1], lines[2], lines[3]]), None),
    ] {
        fs::write(beside(&path), &text).unwrap();
        assert_eq!(code(&loader, "one"), expected, "{text}");
    }
    fs::write(beside(&path), [0xff; 300]).unwrap();
    assert_eq!(code(&loader, "one"), Some("module_bad_signature"));
    fs::remove_file(beside(&path)).unwrap();
    fs::create_dir(beside(&path)).unwrap();
    assert_eq!(code(&loader, "one"), Some("module_bad_signature"));
}

#[test]
fn a_signature_lies_beside_the_file_that_a_link_leads_to() {
    let bench = Bench::new();
    let keys = keys();
    let loader = loader(bench.dir.path(), &[&keys]);
    let versions = bench.dir.path().join("versions");
    fs::create_dir(&versions).unwrap();
    let [one, other] = ["one", "other"].map(|name| versions.join(format!("{name}.so")));
    Recipe { value: 1, ..Recipe::default() }.build(&one);
    Recipe { value: 2, ..Recipe::default() }.build(&other);
    let link = bench.path("current");
    std::os::unix::fs::symlink("versions/one.so", &link).unwrap();
    fs::write(beside(&link), signature(&keys, &fs::read(&one).unwrap())).unwrap();
    assert_eq!(code(&loader, "current"), Some("module_unsigned"));
    sign(&keys, &one);
    sign(&keys, &other);
    fs::remove_file(beside(&link)).unwrap();
    assert_eq!(code(&loader, "current"), None);
    fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(&other, &link).unwrap();
    assert_eq!(code(&loader, "current"), None);
    // The folder that the link is in counts, whatever is signed.
    let mode = |mode| fs::set_permissions(bench.dir.path(), Permissions::from_mode(mode)).unwrap();
    mode(0o777);
    assert_eq!(code(&loader, "current"), Some("module_exposed"));
    mode(0o755);
}

#[test]
fn one_byte_more_or_less_is_another_module() {
    let bench = Bench::new();
    let path = bench.build("one", &Recipe::default());
    let keys = keys();
    let loader = loader(bench.dir.path(), &[&keys]);
    sign(&keys, &path);
    let bytes = fs::read(&path).unwrap();
    let mut more = bytes.clone();
    more.push(0);
    let mut other = bytes.clone();
    *other.last_mut().unwrap() ^= 1;
    for changed in [&more[..], &other, &bytes[..bytes.len() - 1], b"\x7fELF"] {
        fs::write(&path, changed).unwrap();
        // Also that it is no module is not said before.
        assert_eq!(code(&loader, "one"), Some("module_altered"));
    }
    fs::write(&path, &bytes).unwrap();
    assert_eq!(code(&loader, "one"), None);
}

#[test]
fn what_was_kept_is_verified_anew() {
    let bench = Bench::new();
    let path = bench.build("one", &Recipe { value: 7, ..Recipe::default() });
    let (keys, stranger) = (keys(), keys());
    sign(&keys, &path);
    let before = loader(bench.dir.path(), &[&keys]);
    let module = before.verify("one").unwrap().load().unwrap();
    let origin = module.identity().clone();
    assert!(origin.signature.is_some());
    let kept = |loader: &FileLoader, origin: &Identity| {
        let image = module.image().unwrap();
        loader.verify_kept(image, origin).map(|verified| value(&*verified.load().unwrap()))
    };
    let next = loader(bench.dir.path(), &[&keys]);
    assert_eq!(kept(&next, &origin).unwrap(), 7);
    let unsigned = Identity { signature: None, ..origin.clone() };
    assert_eq!(kept(&next, &unsigned).unwrap_err().code, "module_unsigned");
    let other = signature(&stranger, &fs::read(&path).unwrap());
    let other = Identity { signature: Some(other), ..origin.clone() };
    assert_eq!(kept(&next, &other).unwrap_err().code, "module_untrusted");
    let of_others = Identity { signature: Some(signature(&keys, b"x")), ..origin.clone() };
    assert_eq!(kept(&next, &of_others).unwrap_err().code, "module_altered");
    // With other keys than the process before had.
    let strict = loader(bench.dir.path(), &[&stranger]);
    assert_eq!(kept(&strict, &origin).unwrap_err().code, "module_untrusted");
    // A process without keys does not ask, and forgets nothing that another asks for.
    let open = loader(bench.dir.path(), &[]);
    assert_eq!(kept(&open, &origin).unwrap(), 7);
    assert_eq!(kept(&open, &unsigned).unwrap(), 7);
}

#[test]
fn a_file_that_is_exchanged_meanwhile_is_never_loaded() {
    let bench = Bench::new();
    let keys = keys();
    // Large, so that there is time for it.
    let large = |name: &str, value: u32| {
        let path = bench.build(name, &Recipe { value, ..Recipe::default() });
        let mut bytes = fs::read(&path).unwrap();
        bytes.resize(4 << 20, 0);
        fs::remove_file(path).unwrap();
        bytes
    };
    let (good, evil) = (large("good", 1), large("evil", 2));
    let path = bench.path("victim");
    fs::write(&path, &good).unwrap();
    sign(&keys, &path);
    let loader = loader(bench.dir.path(), &[&keys]);
    let is_over = AtomicBool::new(false);
    let (mut codes, mut loaded) = (std::collections::BTreeMap::new(), 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let spare = bench.dir.path().join("spare");
            for bytes in [&evil, &good].into_iter().cycle() {
                fs::write(&spare, bytes).unwrap();
                fs::rename(&spare, &path).unwrap();
                std::thread::sleep(Duration::from_millis(2));
                if is_over.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        let deadline = Instant::now() + Duration::from_secs(60);
        let is_enough = |codes: &std::collections::BTreeMap<_, u32>, loaded: u32| {
            loaded > 0 && codes.contains_key("module_swapped")
        };
        while !is_enough(&codes, loaded) && Instant::now() < deadline {
            match loader.verify("victim") {
                Ok(verified) => {
                    assert_eq!(value(&*verified.load().unwrap()), 1, "the other one is loaded");
                    loaded += 1;
                }
                Err(error) => *codes.entry(error.code).or_default() += 1,
            }
        }
        is_over.store(true, Ordering::Relaxed);
        assert!(is_enough(&codes, loaded), "{codes:?}, {loaded} loaded");
    });
    let known = ["module_swapped", "module_altered"];
    assert!(codes.keys().all(|code| known.contains(code)), "{codes:?}");
}
