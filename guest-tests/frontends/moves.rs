//! The guest goes on in another QEMU: live migration between two daemons, and QEMU replaced on the
//! spot before one daemon.

use std::fs::File;
use std::time::Duration;

use guest_tests::daemon::{Daemon, disk_directory};
use guest_tests::guest::fio::{self, Fio};
use guest_tests::guest::{Cpr, GuestOptions};

use crate::stage::{
    FileDisk, NotHere, Outcome, Upgrades, assert_no_complaints, beside, boot, finish, say,
};

/// The longest that any of it takes; the machine may be busy.
const WITHIN: Duration = Duration::from_secs(60);
/// So many MiB per second, so that pages are sent more than once.
const SLOWLY: u64 = 64;

/// There and back, with an upgrade of each daemon on the way.
pub fn migration() -> Outcome {
    let directory = disk_directory();
    let image = directory.path().join("disk.img");
    File::create(&image).and_then(|file| file.set_len(64 << 20)).expect("an image");
    let path = image.display().to_string();
    // The image's lock goes with the guest.
    let daemons = [(); 2].map(|()| {
        let image = ["--blk-file", &path, "--param", "direct=true", "--param", "locking=late"];
        Daemon::start(&[&["--queues", "2"], &image[..]].concat())
    });
    let options = |at: usize| GuestOptions::with_disk(daemons[at].socket());
    let guest = boot(options(0));
    fio::fill(&guest, "vda");
    let (reader, witness) = (Fio::start_reading(&guest, "vda", 40), Fio::start(&guest, 40));
    let mut stood = Vec::new();
    for (from, to) in [(0, 1), (1, 0)] {
        let destination = guest.destination(&options(to)).unwrap_or_else(|e| panic!("{e}"));
        guest.begin_migration(&destination, SLOWLY).unwrap_or_else(|e| panic!("{e}"));
        daemons[from].call(&["upgrade", "file"]);
        stood.push(guest.go_over(destination, WITHIN).unwrap_or_else(|e| panic!("{e}")));
        daemons[to].call(&["upgrade", "file"]);
    }
    assert!(reader.is_running() && witness.is_running(), "fio has ended before the migrations");
    let read = reader.finish_reading();
    let report = finish(&guest, witness);
    assert_no_complaints(&guest);
    let _ = guest.shutdown();
    Ok(format!("stood still for {stood:?}; {read:?}; {}", say(4, &report)))
}

pub fn cpr_reboot() -> Outcome {
    cpr(Cpr::Reboot)
}

pub fn cpr_transfer() -> Outcome {
    cpr(Cpr::Transfer)
}

pub fn cpr_exec() -> Outcome {
    cpr(Cpr::Exec)
}

/// Twice, before one daemon that is upgraded all the time.
fn cpr(mode: Cpr) -> Outcome {
    let disk = FileDisk::new();
    let options = GuestOptions {
        machine: "q35,aux-ram-share=on".to_owned(),
        ..GuestOptions::with_disk(disk.daemon.socket())
    };
    let guest = boot(options.clone());
    if !guest.knows(mode).unwrap_or_else(|error| panic!("{error}")) {
        return Err(NotHere(format!("this QEMU has no {}", mode.name())));
    }
    let times = 2;
    let (count, report) = beside(&Upgrades::File(&disk), || {
        let fio = Fio::start(&guest, 20);
        for _ in 0..times {
            guest.replace_qemu(mode, &options, WITHIN).unwrap_or_else(|error| panic!("{error}"));
        }
        finish(&guest, fio)
    });
    let _ = guest.shutdown();
    Ok(format!("{times} times: {}", say(count, &report)))
}
