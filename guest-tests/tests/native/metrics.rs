//! The page of metrics, as Prometheus reads it: what it counts, that it goes on over the deaths of
//! processes, and that clients which are slow or hostile do it no harm.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::client::{Client, Options, Request, Status};
use guest_tests::daemon::{Daemon, run_daemon};
use guest_tests::stamp::{LoadOptions, run_load};
use rustix::process::Signal;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(10);

fn start(more: &[&str]) -> Daemon {
    let args = ["--domain", "ramdisk", "--param", "size=64M", "--metrics", "127.0.0.1:0"];
    Daemon::start(&[&args, more].concat())
}

/// Where the page is, as the log says.
fn address(daemon: &Daemon) -> String {
    let log = daemon.log();
    let (_, rest) = log.split_once("metrics at http://").expect("a line about metrics");
    rest.split_once("/metrics").expect("an address").0.to_owned()
}

/// What an HTTP server answers: the head, and the body.
fn ask(address: &str, request: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).expect("the page is there");
    stream.set_read_timeout(Some(LIMIT)).expect("a timeout");
    stream.write_all(request.as_bytes()).expect("it hears");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    (head.to_owned(), body.to_owned())
}

fn scrape(daemon: &Daemon) -> String {
    let (head, body) = ask(&address(daemon), "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    body
}

/// All samples, by name and labels.
fn samples(page: &str) -> BTreeMap<String, f64> {
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ').expect("a value");
        (name.to_owned(), value.parse().unwrap_or_else(|e| panic!("{line}: {e}")))
    };
    lines.map(sample).collect()
}

fn value(samples: &BTreeMap<String, f64>, name: &str) -> f64 {
    let name = format!("vhost_hotswap_{name}");
    *samples.get(&name).unwrap_or_else(|| panic!("no {name} in {samples:#?}"))
}

/// The sum of all series of a name, whatever their queue.
fn sum(samples: &BTreeMap<String, f64>, name: &str, operation: &str) -> f64 {
    let (name, operation) =
        (format!("vhost_hotswap_{name}{{"), format!("operation=\"{operation}\""));
    let is_it = |series: &str| series.starts_with(&name) && series.contains(&operation);
    samples.iter().filter(|(series, _)| is_it(series)).map(|(_, value)| value).sum()
}

#[test]
fn each_operation_is_counted_by_queue_with_its_bytes_errors_and_time() {
    let daemon = start(&["--queues", "2"]);
    let options = Options { queues: 2, ..Options::default() };
    let mut client = Client::connect(daemon.socket(), &options).expect("a connection");
    let mut does = |queue: usize, request: Request<'_>, status: Status| {
        let (answer, _) = client.queue(queue).execute(request, LIMIT).expect("an answer");
        assert_eq!(answer, status);
    };
    let data = [7; 8192];
    for _ in 0..3 {
        does(0, Request::Write { offset: 0, data: &data }, Status::Ok);
    }
    for _ in 0..5 {
        does(1, Request::Read { offset: 0, len: 4096 }, Status::Ok);
    }
    does(1, Request::Flush, Status::Ok);
    does(0, Request::Read { offset: 64 << 20, len: 512 }, Status::IoError);
    let samples = samples(&scrape(&daemon));
    let of = |name: &str, queue: usize, operation: &str| {
        value(&samples, &format!("{name}{{queue=\"{queue}\",operation=\"{operation}\"}}"))
    };
    assert_eq!(of("requests_total", 0, "write"), 3.0);
    assert_eq!(of("request_bytes_total", 0, "write"), 3.0 * 8192.0);
    assert_eq!(of("requests_total", 1, "read"), 5.0);
    assert_eq!(of("request_bytes_total", 1, "read"), 5.0 * 4096.0);
    assert_eq!(of("requests_total", 1, "flush"), 1.0);
    assert_eq!((of("requests_total", 0, "read"), of("errors_total", 0, "read")), (1.0, 1.0));
    assert_eq!(of("errors_total", 1, "read"), 0.0);
    assert_eq!(of("request_duration_seconds_count", 1, "read"), 5.0);
    let took = of("request_duration_seconds_sum", 1, "read");
    assert!(took > 0.0 && took < 5.0, "five reads took {took} s");
    assert_eq!(value(&samples, "in_flight{queue=\"0\"}"), 0.0);
    assert_eq!(value(&samples, "generation"), 1.0);
    assert_eq!(value(&samples, "connected"), 1.0);
    assert_eq!(value(&samples, "capacity_bytes"), f64::from(64 << 20));
    assert_eq!(value(&samples, "state{state=\"serving\"}"), 1.0);
}

#[test]
fn no_counter_goes_back_over_deaths_and_exchanges() {
    let daemon = start(&["--queues", "2"]);
    let load = || run_load(daemon.socket(), &LoadOptions::new(2, 8), Duration::from_millis(300));
    let mut before = samples(&scrape(&daemon));
    let mut requests = 0.0;
    for what in ["", "kill", "server", "supervisor", "kill", "both"] {
        match what {
            "" => {}
            "kill" => daemon.end_server(Signal::KILL),
            "both" => drop(daemon.call(&["upgrade-daemon"])),
            part => drop(daemon.call(&["upgrade-daemon", "--only", part])),
        }
        let page = samples(&scrape(&daemon));
        for (series, value) in &before {
            let is_counter = ["_total", "_bucket", "_count", "_sum"]
                .iter()
                .any(|end| series.split('{').next().is_some_and(|name| name.ends_with(end)));
            let now = page.get(series).copied().unwrap_or(-1.0);
            assert!(!is_counter || now >= *value, "{what}: {series} was {value} and is {now}");
        }
        load();
        before = samples(&scrape(&daemon));
        let all = sum(&before, "requests_total", "read") + sum(&before, "requests_total", "write");
        assert!(all > requests, "{what}: nothing was counted after it: {all}");
        requests = all;
    }
    assert_eq!(value(&before, "server_deaths_total"), 2.0);
    assert_eq!(value(&before, "changes_total{change=\"recovery\",result=\"committed\"}"), 2.0);
    assert_eq!(value(&before, "changes_total{change=\"exchange\",result=\"committed\"}"), 3.0);
    assert_eq!(
        value(&before, "change_phase_seconds_count{change=\"server_exchange\",phase=\"stop\"}"),
        2.0
    );
    assert_eq!(value(&before, "pause_seconds_count{change=\"recovery\"}"), 2.0);
}

#[test]
fn upgrades_are_counted_by_how_they_end_and_their_phases_timed() {
    let daemon = start(&[]);
    daemon.call(&["upgrade", "ramdisk_v2"]);
    daemon.call(&["rollback"]);
    daemon.refuse(&["upgrade", "nowhere"]);
    let page = samples(&scrape(&daemon));
    assert_eq!(value(&page, "generation"), 3.0);
    assert_eq!(value(&page, "changes_total{change=\"upgrade\",result=\"committed\"}"), 1.0);
    assert_eq!(value(&page, "changes_total{change=\"upgrade\",result=\"refused\"}"), 1.0);
    assert_eq!(value(&page, "changes_total{change=\"rollback\",result=\"committed\"}"), 1.0);
    let verify = "change_phase_seconds_sum{change=\"upgrade\",phase=\"verify\"}";
    assert!(value(&page, verify) > 0.0);
    assert!(page.keys().any(|series| series.contains("version=\"1.0.0\"")), "{page:#?}");
}

#[test]
fn trials_and_limits_are_shown() {
    let daemon = start(&[]);
    let page = samples(&scrape(&daemon));
    assert!(!page.keys().any(|name| name.contains("limit_")));
    // Else a first one is no increase.
    assert_eq!(value(&page, "canaries_total{verdict=\"kept\"}"), 0.0);
    daemon.call(&["limit", "--iops", "200", "--bandwidth", "1M"]);
    daemon.call(&["upgrade", "ramdisk_v2", "--canary", "1"]);
    run_load(daemon.socket(), &LoadOptions::new(1, 4), Duration::from_millis(100));
    let page = samples(&scrape(&daemon));
    assert_eq!(value(&page, "canaries_total{verdict=\"kept\"}"), 1.0);
    assert_eq!(value(&page, "limit_requests_per_second"), 200.0);
    assert_eq!(value(&page, "limit_bytes_per_second"), f64::from(1 << 20));
    assert!(value(&page, "held_up_total") >= 0.0);
    daemon.call(&["limit", "--off"]);
    // What `status` knows is as it was when it was asked for last.
    assert_eq!(daemon.status()["limits"], Value::Null);
    let page = samples(&scrape(&daemon));
    assert!(!page.keys().any(|name| name.contains("limit_")), "{page:#?}");
    assert_eq!(value(&page, "canaries_total{verdict=\"kept\"}"), 1.0);
}

#[test]
fn the_page_comes_in_both_formats_and_by_the_control_socket() {
    let daemon = start(&[]);
    let request =
        "GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text; version=1.0.0\r\n\r\n";
    let (head, body) = ask(&address(&daemon), request);
    assert!(head.contains("Content-Type: application/openmetrics-text; version=1.0.0"), "{head}");
    assert!(body.ends_with("# EOF\n"), "{body}");
    let told = daemon.call(&["metrics"]);
    let names = |page: &str| samples(page).into_keys().collect::<BTreeSet<_>>();
    assert_eq!(names(told["text"].as_str().expect("a page")), names(&scrape(&daemon)));
    assert_eq!(told["queues"][0]["operations"]["read"]["requests"], 0);
    let (head, _) = ask(&address(&daemon), "GET /else HTTP/1.1\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 404"), "{head}");
    let off = Daemon::start(&["--domain", "empty"]);
    assert!(off.refuse(&["metrics"]).contains("metrics_off"));
}

#[test]
fn a_unix_socket_will_do_as_well() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("metrics.sock");
    let mut daemon =
        Daemon::start(&["--domain", "empty", "--metrics", path.to_str().expect("a path")]);
    let mut stream = UnixStream::connect(&path).expect("the page is there");
    stream.set_read_timeout(Some(LIMIT)).expect("a timeout");
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").expect("it hears");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    assert!(answer.contains("vhost_hotswap_requests_total{"), "{answer}");
    assert_eq!(daemon.stop().0, 0);
    assert!(!path.exists(), "its socket stays");
}

#[test]
fn what_other_hosts_could_reach_is_refused() {
    for (address, sentence) in [
        ("0.0.0.0:9101", "can be reached from other hosts"),
        ("[::]:9101", "can be reached from other hosts"),
        ("metrics", "neither a Unix socket's path"),
        ("9101", "such as 127.0.0.1:9101"),
    ] {
        let refused = run_daemon(&["--socket-path", "/tmp/none.sock", "--metrics", address]);
        assert_eq!(refused.status, 2, "{refused:?}");
        assert!(refused.stderr.contains(sentence), "{}", refused.stderr);
    }
    let taken = start(&[]);
    let socket = taken.directory().join("other.sock");
    let refused = run_daemon(&[
        "--socket-path",
        socket.to_str().expect("a path"),
        "--metrics",
        &address(&taken),
    ]);
    assert_eq!(refused.status, 1, "{refused:?}");
    assert!(refused.stderr.contains("cannot listen for metrics on http://"), "{}", refused.stderr);
}

#[test]
fn clients_that_are_slow_or_say_half_of_it_hold_up_nothing() {
    let daemon = start(&[]);
    let address = address(&daemon);
    let half = |request: &[u8]| {
        let mut stream = TcpStream::connect(&address).expect("the page is there");
        stream.write_all(request).expect("it hears");
        stream
    };
    // More than there are places for, and some that never read.
    let slow: Vec<TcpStream> = (0..40)
        .map(|at| {
            half(if at % 2 == 0 { b"GET /metrics HT" } else { b"GET / HTTP/1.1\r\nX: y\r\n" })
        })
        .collect();
    let deaf: Vec<TcpStream> = (0..6).map(|_| half(b"GET / HTTP/1.1\r\n\r\n")).collect();
    let started = Instant::now();
    for _ in 0..10 {
        assert!(scrape(&daemon).contains("vhost_hotswap_requests_total{"));
        assert_eq!(daemon.status()["state"], "serving");
    }
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    daemon.call(&["upgrade", "ramdisk_v2"]);
    let mut long = half(b"GET / HTTP/1.1\r\n");
    let line = format!("X: {}\r\n", "x".repeat(64 << 10));
    // It may be refused before all of it is sent.
    let _ = long.write_all(line.as_bytes());
    let mut answer = Vec::new();
    let _ = long.read_to_end(&mut answer);
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 431"), "{answer:?}");
    // In the end they are cut off.
    let end = Instant::now() + LIMIT;
    for mut stream in slow {
        stream.set_read_timeout(Some(Duration::from_millis(50))).expect("a timeout");
        loop {
            match stream.read(&mut [0; 64]) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    assert!(Instant::now() < end, "a slow client is never cut off");
                }
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
    }
    drop(deaf);
}

/// The names of metrics in a text.
fn names(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c: char| !is_part(c));
    words.filter(|word| word.starts_with("vhost_hotswap_")).map(ToOwned::to_owned).collect()
}

#[test]
fn the_dashboard_names_what_the_page_has() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../backend/host/grafana.json");
    let dashboard = fs::read_to_string(path).expect("the dashboard");
    let parsed: Value = serde_json::from_str(&dashboard).expect("JSON");
    assert!(parsed["panels"].as_array().is_some_and(|panels| panels.len() > 10));
    let daemon = start(&[]);
    daemon.call(&["upgrade", "ramdisk_v2"]);
    run_load(daemon.socket(), &LoadOptions::new(1, 4), Duration::from_millis(100));
    let page = names(&scrape(&daemon));
    let missing: Vec<_> = names(&dashboard).difference(&page).cloned().collect();
    assert!(missing.is_empty(), "the dashboard has {missing:?}, and the page {page:#?}");
    // What a person would look for is in both.
    for name in
        ["requests_total", "errors_total", "request_duration_seconds_bucket", "pause_seconds_sum"]
    {
        assert!(names(&dashboard).contains(&format!("vhost_hotswap_{name}")), "{name}");
    }
}

/// A program of Prometheus, if there is one: installed, or where `scripts/setup` unpacks it.
fn tool(name: &str) -> Option<PathBuf> {
    let unpacked = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("tools/usr/bin");
    let is_there = |program: &PathBuf| {
        let mut there = Command::new(program);
        there.arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
    };
    [PathBuf::from(name), unpacked.join(name)].into_iter().find(is_there)
}

#[test]
fn prometheus_reads_the_page() {
    let daemon = start(&["--queues", "2"]);
    daemon.call(&["upgrade", "ramdisk_v2", "--canary", "1"]);
    daemon.call(&["limit", "--iops", "100000", "--bandwidth", "1G"]);
    run_load(daemon.socket(), &LoadOptions::new(2, 4), Duration::from_millis(100));
    let (Some(promtool), Some(prometheus)) = (tool("promtool"), tool("prometheus")) else {
        println!("skipped: there is no promtool or prometheus: scripts/setup unpacks them");
        return;
    };
    let page = scrape(&daemon);
    let mut check = Command::new(promtool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool");
    check.stdin.take().expect("a pipe").write_all(page.as_bytes()).expect("it reads");
    let output = check.wait_with_output().expect("an end");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && said.is_empty(), "{said}\n{page}");
    let directory = tempfile::tempdir().expect("a directory");
    let config = directory.path().join("prometheus.yml");
    let text = format!(
        "global: {{scrape_interval: 1s}}\nscrape_configs:\n  - job_name: disk\n    static_configs:\n      - targets: ['{}']\n",
        address(&daemon)
    );
    fs::write(&config, text).expect("a configuration");
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|it| it.local_addr());
    let listen = port.expect("a port").to_string();
    let mut prometheus = Command::new(prometheus)
        .arg(format!("--config.file={}", config.display()))
        .arg(format!("--storage.tsdb.path={}", directory.path().join("data").display()))
        .arg(format!("--web.listen-address={listen}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("prometheus");
    let query = |query: &str| -> Option<Value> {
        let mut stream = TcpStream::connect(&listen).ok()?;
        let request = format!("GET /api/v1/{query} HTTP/1.0\r\n\r\n");
        stream.write_all(request.as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()
    };
    let end = Instant::now() + PATIENCE;
    let is_there =
        |answer: &Value| answer["data"]["result"].as_array().is_some_and(|it| it.len() == 2);
    let mut last = None;
    while !last.as_ref().is_some_and(is_there) && Instant::now() < end {
        thread::sleep(Duration::from_millis(250));
        last = query(
            "query?query=vhost_hotswap_request_duration_seconds_count%7Boperation%3D%22write%22%7D",
        );
    }
    let targets = query("targets");
    let _ = prometheus.kill();
    let _ = prometheus.wait();
    assert!(last.as_ref().is_some_and(is_there), "{last:?}\n{targets:?}");
    assert_eq!(targets.expect("targets")["data"]["activeTargets"][0]["health"], "up");
}
