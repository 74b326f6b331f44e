//! The disk behind a server keeps the contract, with servers that take one connection and several.

mod common;

use common::Server;
use domain_conformance::{Options, run};
use domain_nbd::NbdDisk;

fn keeps_the_contract(server: &Server, more: &[&str]) {
    run::<NbdDisk>(&Options {
        refused: vec![
            ("uri".into(), String::new()),
            ("uri".into(), "nbds://h/e".into()),
            ("timeout".into(), "soon".into()),
            ("settle".into(), "-1".into()),
            ("connections".into(), "17".into()),
        ],
        ..Options::new(server.params(more))
    });
}

#[test]
fn keeps_the_contract_with_nbdkit() {
    keeps_the_contract(&Server::nbdkit(&["memory", "2M"]), &["serial=nbd"]);
}

#[test]
fn keeps_the_contract_with_one_connection() {
    keeps_the_contract(&Server::nbdkit(&["memory", "2M"]), &["connections=1"]);
}
