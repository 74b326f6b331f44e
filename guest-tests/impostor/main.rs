//! A program that is given to a daemon in the place of its own. What it does wrong is in the name
//! of its file.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

fn main() {
    let mut args = std::env::args();
    let name = args.next().unwrap_or_default();
    let asked = args.next().unwrap_or_default();
    let does = |what: &str| name.ends_with(what);
    if does("silent") {
        thread::sleep(Duration::from_secs(3600));
    } else if does("refuses") && asked == "--check-state" {
        println!(r#"{{"check_state":2,"program":"9.9.9","refused":"the state is too old"}}"#);
        std::process::exit(1);
    } else if does("of-another-version") && asked == "--check-state" {
        println!(r#"{{"check_state":2,"program":"9.9.9"}}"#);
    } else if does("forgets") && asked == "--check-state" {
        println!(r#"{{"check_state":1,"program":"9.9.9","goes_back":true}}"#);
    } else if does("forgets") {
        // The real one, which is called as this one was, but finds no state.
        let real = Path::new(&name).with_file_name("vhost-hotswap");
        let script = r#"eval "exec $1<&-"; exec "$0" --resume-state "$@""#;
        let error = Command::new("bash").args(["-c", script]).arg(real).args(args).exec();
        panic!("bash cannot be run: {error}");
    } else if does("talks") {
        while std::panic::catch_unwind(|| println!("nonsense")).is_ok() {}
    } else if does("dies") {
        std::process::abort();
    }
}
