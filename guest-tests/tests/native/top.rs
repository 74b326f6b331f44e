//! `hotswapctl top`: in a real terminal, where it is resized and quit, and as lines of JSON.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::daemon::{Daemon, binary, run_ctl};
use guest_tests::stamp::{Load, LoadOptions};
use rustix::process::Signal;
use serde_json::Value;

fn start() -> Daemon {
    Daemon::start(&["--domain", "ramdisk", "--param", "size=64M", "--metrics", "127.0.0.1:0"])
}

/// A terminal of tmux's with a command in it; a server of its own, which ends with this.
struct Terminal {
    name: String,
}

impl Terminal {
    fn open(command: &str) -> Terminal {
        let terminal = Terminal { name: format!("hotswap-test-{}", std::process::id()) };
        let size = ["-x", "110", "-y", "40"];
        terminal.tmux(
            &[&["-f", "/dev/null", "new-session", "-d", "-s", "top"], &size[..], &[command]]
                .concat(),
        );
        terminal
    }

    /// What tmux prints; none if it fails.
    fn try_tmux(&self, args: &[&str]) -> Option<String> {
        let output = Command::new("tmux").args(["-L", &self.name]).args(args).output();
        let output = output.expect("tmux runs");
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn tmux(&self, args: &[&str]) -> String {
        self.try_tmux(args).unwrap_or_else(|| panic!("tmux {args:?} fails"))
    }

    /// The screen, once it has this on it.
    fn screen_with(&self, what: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let screen = self.tmux(&["capture-pane", "-p", "-t", "top"]);
            if screen.contains(what) {
                return screen;
            }
            assert!(Instant::now() < end, "{what:?} does not appear:\n{screen}");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.try_tmux(&["kill-server"]);
    }
}

#[test]
fn it_draws_on_a_terminal_that_is_resized_and_quit() {
    if Command::new("tmux").arg("-V").stdout(Stdio::null()).status().is_err() {
        println!("skipped: there is no tmux");
        return;
    }
    let daemon = start();
    let load = Load::start(daemon.socket(), &LoadOptions::new(1, 4));
    load.wait_for(100);
    let command = format!(
        "{} --control-path {} top --interval-ms 100; echo status $?; sleep 60",
        binary("hotswapctl").display(),
        daemon.control().display()
    );
    let terminal = Terminal::open(&command);
    terminal.screen_with("serving  generation 1  ramdisk 1.0.0");
    let screen = terminal.screen_with("write");
    for column in ["requests/s", "99 %", "in flight", "last changes", "q: quit"] {
        assert!(screen.contains(column), "no {column:?}:\n{screen}");
    }
    daemon.call(&["upgrade", "ramdisk_v2"]);
    // The generation is there before the one before stands by.
    let screen = terminal.screen_with("standby ramdisk 1.0.0");
    assert!(screen.contains("generation 2  ramdisk 2.0.0"), "{screen}");
    // The change and its phases.
    let screen = terminal.screen_with("upgrade committed");
    assert!(screen.contains("in us: verify"), "{screen}");
    terminal.tmux(&["resize-window", "-t", "top", "-x", "60", "-y", "16"]);
    let end = Instant::now() + PATIENCE;
    loop {
        let screen = terminal.screen_with("generation 2");
        // The last line is at the new bottom.
        if screen.lines().nth(15).is_some_and(|line| line.contains("q: quit")) {
            break;
        }
        assert!(Instant::now() < end, "it is not drawn anew:\n{screen}");
        thread::sleep(Duration::from_millis(50));
    }
    // A size that there is no room in does no harm.
    terminal.tmux(&["resize-window", "-t", "top", "-x", "10", "-y", "3"]);
    thread::sleep(Duration::from_millis(300));
    terminal.tmux(&["resize-window", "-t", "top", "-x", "100", "-y", "30"]);
    terminal.screen_with("last changes");
    daemon.end_server(Signal::KILL);
    terminal.screen_with("deaths 1  recoveries 1");
    terminal.tmux(&["send-keys", "-t", "top", "q"]);
    let screen = terminal.screen_with("status 0");
    assert!(!screen.contains("last changes"), "the screen is not as it was before:\n{screen}");
    load.stop();
}

#[test]
fn lines_of_json_have_rates_and_latencies() {
    let daemon = start();
    daemon.call(&["upgrade", "ramdisk_v2"]);
    let load = Load::start(daemon.socket(), &LoadOptions::new(1, 4).on_unknown_content());
    load.wait_for(100);
    let mut top = Command::new(binary("hotswapctl"))
        .arg("--control-path")
        .arg(daemon.control())
        .args(["--json", "top", "--interval-ms", "200"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let lines = BufReader::new(top.stdout.take().expect("a pipe")).lines();
    let views: Vec<Value> = lines
        .take(3)
        .map(|line| serde_json::from_str(&line.expect("a line")).expect("JSON"))
        .collect();
    // Its reader is gone, which is the end, and no failure.
    assert!(top.wait().expect("an end").success());
    for view in &views {
        assert!(view["interval_s"].as_f64() >= Some(0.2), "{view}");
        assert_eq!((&view["state"], &view["generation"]), (&"serving".into(), &2.into()));
        assert!(view["queues"][0]["requests_per_s"].as_f64() > Some(0.0), "{view}");
        let writes = &view["operations"]["write"];
        assert!(writes["requests_per_s"].as_f64() > Some(0.0), "{view}");
        let latency = |member: &str| writes["latency_us"][member].as_f64().expect("a number");
        assert!(latency("p50") > 0.0 && latency("p50") <= latency("p99"), "{view}");
        assert!(latency("p99") <= latency("max"), "{view}");
        assert_eq!(view["last_changes"][0]["change"], "upgrade");
        assert!(view["last_changes"][0]["phases_us"]["verify"].as_u64() > Some(0), "{view}");
    }
    load.stop();
    // What does not count shows what there is.
    let off = Daemon::start(&["--domain", "empty", "--no-supervisor"]);
    let mut top = Command::new(binary("hotswapctl"))
        .arg("--control-path")
        .arg(off.control())
        .args(["--json", "top", "--interval-ms", "50"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut line = String::new();
    BufReader::new(top.stdout.take().expect("a pipe")).read_line(&mut line).expect("a line");
    let view: Value = serde_json::from_str(&line).expect("JSON");
    assert_eq!(view["operations"], Value::Null);
    assert_eq!(view["queues"][0]["index"], 0);
    let _ = top.wait();
}

#[test]
fn without_a_terminal_or_a_daemon_it_says_so() {
    let daemon = start();
    let control = daemon.control().to_str().expect("a path");
    let refused = run_ctl(&["--control-path", control, "top"]);
    assert_eq!(refused.status, 1);
    assert!(refused.stderr.contains("give --json"), "{}", refused.stderr);
    let refused = run_ctl(&["--control-path", "/nowhere/control", "--json", "top"]);
    assert_eq!(refused.status, 1);
    assert!(refused.stderr.contains("(unreachable)"), "{}", refused.stderr);
}
