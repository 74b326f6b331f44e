//! A disk in an image of the host's keeps the contract, with an image in memory in the cluster's
//! place.

use domain_api::Params;
use domain_conformance::{Options, run};
use domain_rbd::RbdDisk;

fn options(pairs: &[&str]) -> Options {
    let params = Params::from_pairs(["image=rbd/disk"].iter().chain(pairs)).unwrap();
    Options {
        refused: vec![("image".into(), String::new()), ("locking".into(), "false".into())],
        ..Options::new(params)
    }
}

#[test]
fn keeps_the_contract() {
    run::<RbdDisk>(&Options { resizes: true, ..options(&["serial=rbd"]) });
}

#[test]
fn keeps_the_contract_where_it_is_only_read() {
    run::<RbdDisk>(&Options { data: false, ..options(&["readonly=true"]) });
}
