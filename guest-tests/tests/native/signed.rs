//! With `--trusted-key`, what runs is what a trusted key has signed, whichever way it comes.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use guest_tests::daemon::{Daemon, run_daemon};
use guest_tests::signer::{Signer, signature_of, unsigned};
use guest_tests::stamp::{Load, LoadOptions, assert_intact};
use rustix::process::Signal;
use serde_json::json;
use tempfile::TempDir;

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A folder with the modules of two versions, signed.
fn folder(signer: &Signer) -> (TempDir, PathBuf, PathBuf) {
    let directory = tempfile::tempdir().expect("a directory");
    let first = signer.signed("ramdisk", directory.path());
    let second = signer.signed("ramdisk_v2", directory.path());
    (directory, first, second)
}

/// A folder below `directory`, with a module that `spoil` makes one to be refused.
fn spoiled(directory: &Path, name: &str, spoil: impl FnOnce(&Path)) -> PathBuf {
    let directory = directory.join(name);
    fs::create_dir(&directory).expect("a directory");
    let path = unsigned("ramdisk_v2", &directory);
    spoil(&path);
    path
}

fn append(path: &Path) {
    let mut bytes = fs::read(path).expect("a file");
    bytes.push(0);
    fs::write(path, bytes).expect("a file");
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).expect("a mode");
}

/// Modules that are to be refused, and with what.
fn refused(signer: &Signer, directory: &Path) -> Vec<(&'static str, PathBuf)> {
    let stranger = Signer::default();
    let module = |name, spoil: &dyn Fn(&Path)| spoiled(directory, name, spoil);
    let signed_and = |name, then: &dyn Fn(&Path)| {
        module(name, &|path| {
            signer.sign(path);
            then(path);
        })
    };
    vec![
        ("module_unsigned", module("unsigned", &|_| {})),
        ("module_untrusted", module("stranger", &|path| stranger.sign(path))),
        ("module_altered", signed_and("altered", &append)),
        (
            "module_altered",
            signed_and("comment", &|path| {
                let signature = fs::read_to_string(signature_of(path)).expect("a signature");
                let other = signature.replace("of a test", "of a pest");
                assert_ne!(signature, other);
                fs::write(signature_of(path), other).expect("a signature");
            }),
        ),
        (
            // Another module that is in order, and its own signature is somewhere else.
            "module_altered",
            signed_and("exchanged", &|path| {
                let other = unsigned("ramdisk", path.parent().expect("a folder"));
                fs::rename(other, path).expect("exchanged");
            }),
        ),
        (
            "module_bad_signature",
            signed_and("cut", &|path| fs::write(signature_of(path), "x\ny\n").expect("a file")),
        ),
        ("module_exposed", signed_and("group", &|path| mode(path, 0o664))),
        (
            "module_exposed",
            signed_and("folder", &|path| mode(path.parent().expect("a folder"), 0o757)),
        ),
    ]
}

#[test]
fn what_is_not_in_order_is_refused_with_a_code_of_its_own() {
    let signer = Signer::default();
    let (directory, first, second) = folder(&signer);
    let key = directory.path().join("modules.pub");
    signer.write_public(&key);
    let start = ["--domain", text(&first), "--trusted-key", text(&key), "--param", "size=64M"];
    let daemon = Daemon::start(&start);
    let load = Load::start(daemon.socket(), &LoadOptions::new(1, 16));
    load.wait_for(100);
    let refused = refused(&signer, directory.path());
    let mut sentences = Vec::new();
    for (code, path) in &refused {
        let check = daemon.refuse(&["check", text(path)]);
        assert!(check.contains(&format!("({code})")), "{path:?}: {check}");
        assert_eq!(check, daemon.refuse(&["upgrade", text(path)]));
        assert_eq!(check, daemon.refuse(&["upgrade", text(path), "--canary", "1"]));
        let sentence = check.trim_start_matches("error: ");
        sentences.push(sentence.trim_end_matches(&format!(" ({code})")).to_owned());
    }
    assert_eq!(daemon.status()["generation"], 1);
    // The first module may not be one of them, either.
    for ((_, path), sentence) in refused.iter().zip(sentences) {
        let directory = tempfile::tempdir().expect("a directory");
        let (socket, key) = (directory.path().join("s"), signer.public());
        let start = ["--socket-path", text(&socket), "--domain", text(path)];
        let output = run_daemon(&[&start[..], &["--trusted-key", &key]].concat());
        assert_eq!(output.status, 1, "{output:?}");
        assert!(output.stderr.contains(&sentence), "{sentence}: {}", output.stderr);
    }
    daemon.call(&["check", text(&second)]);
    daemon.call(&["upgrade", text(&second)]);
    daemon.call(&["rollback"]);
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
}

#[test]
fn it_holds_through_deaths_and_exchanges() {
    let signer = Signer::default();
    let (directory, first, second) = folder(&signer);
    let start = ["--domain", text(&first), "--trusted-key", &signer.public()];
    let daemon = Daemon::start(&[&start[..], &["--param", "size=64M"]].concat());
    let load = Load::start(daemon.socket(), &LoadOptions::new(1, 16));
    load.wait_for(100);
    daemon.call(&["upgrade", text(&second)]);
    // What goes on is what was kept, and no file.
    let bad = spoiled(directory.path(), "unsigned", |_| {});
    for path in [&first, &second] {
        fs::remove_file(signature_of(path)).expect("removed");
    }
    let goes_on = |how: &str| {
        let code = daemon.refuse(&["check", text(&bad)]);
        assert!(code.contains("(module_unsigned)"), "after {how}: {code}");
        let now = daemon.wait_until(how, |now| !now["standby"].is_null());
        assert_eq!(now["domain"]["version"], "2.0.0", "after {how}");
    };
    daemon.end_server(Signal::KILL);
    goes_on("a death");
    daemon.call(&["upgrade-daemon", "--only", "server"]);
    goes_on("an exchange");
    daemon.call(&["upgrade-daemon"]);
    goes_on("an exchange of both");
    daemon.end_server(Signal::KILL);
    goes_on("a death after it");
    assert_eq!(daemon.call(&["rollback"])["to"]["version"], "1.0.0");
    assert!(daemon.refuse(&["upgrade", text(&second)]).contains("(module_unsigned)"));
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
}

#[test]
fn a_key_that_is_none_is_said_at_the_start() {
    let directory = tempfile::tempdir().expect("a directory");
    let (text_file, open) = (directory.path().join("text"), directory.path().join("open.pub"));
    fs::write(&text_file, "no key\n").expect("a file");
    Signer::default().write_public(&open);
    mode(&open, 0o666);
    let nowhere = directory.path().join("nowhere");
    for supervisor in [&[][..], &["--no-supervisor"]] {
        for (key, why) in [
            (text(&text_file), "no public key in its second line"),
            (text(&open), "can be written to by all users"),
            (text(&nowhere), "it is no key, and as a file"),
        ] {
            let socket = directory.path().join("s");
            let start = ["--socket-path", text(&socket), "--trusted-key", key];
            let output = run_daemon(&[&start[..], supervisor].concat());
            assert_eq!(output.status, 1, "{output:?}");
            assert!(output.stderr.contains(why), "{why}: {}", output.stderr);
        }
    }
}

#[test]
fn what_all_users_can_write_to_is_refused_without_keys_too() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = unsigned("ramdisk_v2", directory.path());
    let daemon = Daemon::start(&["--domain", "ramdisk", "--param", "size=64M"]);
    mode(&path, 0o666);
    assert!(daemon.refuse(&["check", text(&path)]).contains("(module_exposed)"));
    mode(&path, 0o664);
    assert_eq!(daemon.call(&["check", text(&path)])["accepted"], json!(true));
}
