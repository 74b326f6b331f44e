//! Everything that can happen to a device, in an order that a seed chooses, with a guest on it.
//! `scripts/soak` does it for longer.

use std::process::Command;

/// How long, and on what. The other disk is soaked with a native client.
const SHORT: [&str; 4] = ["0.35", "--guest", "--disk", "direct"];

#[test]
fn a_short_soak_loses_nothing() {
    let soak = Command::new(env!("CARGO_BIN_EXE_soak")).args(SHORT).output().expect("it runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (said, complaint) = (text(&soak.stdout), text(&soak.stderr));
    println!("{said}");
    assert!(soak.status.success(), "{complaint}");
    assert!(said.contains("soak: clean"), "{said}\n{complaint}");
}
