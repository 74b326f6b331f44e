//! A disk behind an NBD server, under a load that checks every block: upgraded, its process
//! exchanged and killed, its server ended and started again.

use std::path::Path;

use guest_tests::PATIENCE;
use guest_tests::client::{Client, Options, Request, Status};
use guest_tests::daemon::Daemon;
use guest_tests::nbd::NbdServer;
use guest_tests::operator::Operator;
use guest_tests::stamp::{Load, LoadOptions, assert_intact};
use serde_json::Value;

fn serve(server: &NbdServer, more: &[&str]) -> Daemon {
    let uri = server.uri("");
    let args = ["--domain", "nbd", "--param", &uri, "--queues", "2"];
    Daemon::start(&[&args[..], more].concat())
}

fn counter(status: &Value, name: &str) -> u64 {
    status["counters"][name].as_u64().unwrap_or(0)
}

/// How many lines nbdkit's log filter has of this.
fn lines_of(log: &Path, what: &str) -> usize {
    let text = std::fs::read_to_string(log).expect("nbdkit logs");
    text.lines().filter(|line| line.contains(what)).count()
}

fn connections(log: &Path) -> usize {
    lines_of(log, " Connect ")
}

#[test]
fn each_flush_of_the_guest_is_one_of_the_server_and_no_write_is_more() {
    let server = NbdServer::nbdkit(&["--filter=log", "memory", "64M", "logfile=FOLDER/log"]);
    let log = server.folder().join("log");
    let mut daemon = serve(&server, &[]);
    let mut client = Client::connect(daemon.socket(), &Options::default()).expect("a client");
    let data = vec![5; 4096];
    let mut execute = |request| {
        let answer = client.queue(0).execute(request, PATIENCE);
        assert_eq!(answer.expect("an answer").0, Status::Ok);
    };
    let before = lines_of(&log, " Flush id=");
    for at in 0..10 {
        for block in 0..3 {
            execute(Request::Write { offset: (at * 3 + block) * 4096, data: &data });
        }
        execute(Request::Flush);
    }
    assert_eq!(lines_of(&log, " Flush id=") - before, 10, "one for each");
    assert_eq!(lines_of(&log, " Write id="), 30);
    assert_eq!(lines_of(&log, "fua=1"), 0, "it is durable with no server that takes it");
    drop(client);
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
}

#[test]
fn upgrades_and_exchanges_take_the_connections_along() {
    let server = NbdServer::nbdkit(&["--filter=log", "memory", "64M", "logfile=FOLDER/log"]);
    let log = server.folder().join("log");
    let mut daemon = serve(&server, &[]);
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 32));
    load.wait_for(2000);
    let before = connections(&log);
    let mut operator = Operator::new(&daemon);
    let mut pauses: Vec<u64> = Vec::new();
    for round in 0..50 {
        let reply = operator.upgrade("nbd", "handover", &[]);
        pauses.push(reply["phases_us"]["pause"].as_f64().expect("a number") as u64);
        if round % 10 == 9 {
            operator.roll_back("handover");
        }
        load.wait_for(50);
    }
    pauses.sort_unstable();
    println!("pause of 50 upgrades: median {} us, most {} us", pauses[25], pauses[49]);
    assert_eq!(connections(&log), before, "an upgrade has connected anew");
    for _ in 0..10 {
        let reply = daemon.call(&["upgrade-daemon", "--only", "server"]);
        println!("exchange: {}", reply["phases_us"]);
        load.wait_for(50);
    }
    assert_eq!(connections(&log), before, "an exchange has connected anew");
    load.wait_for(1000);
    let report = load.stop();
    report.assert_clean();
    // The counts of the last server's process begin anew; what is loaded does not pile up.
    let status = daemon.status();
    assert_eq!(counter(&status, "nbd_connections_lost"), 0, "{status}\n{}", daemon.log());
    assert_intact(daemon.socket(), &report.ledgers);
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
}
