//! What a machine's owner does to a running guest: stops it, resets it, adds and removes devices.

use std::thread;
use std::time::{Duration, Instant};

use guest_tests::daemon::Daemon;
use guest_tests::guest::fio::Fio;
use guest_tests::guest::{Guest, GuestOptions};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::stage::{
    FIO_SECONDS, FileDisk, Outcome, Upgrades, assert_no_complaints, beside, boot, end, finish,
    memory_disk, say,
};

/// A guest with one disk, doing nothing special.
pub fn linux() -> Outcome {
    let daemon = memory_disk();
    let guest = boot(GuestOptions::with_disk(daemon.socket()));
    let (count, report) =
        beside(&Upgrades::Memory(&daemon), || finish(&guest, Fio::start(&guest, FIO_SECONDS)));
    let kernel = guest.sh("uname -r");
    end(guest, daemon);
    Ok(format!("Linux {kernel}: {}", say(count, &report)))
}

/// Queues as deep as QEMU makes them.
pub fn deep() -> Outcome {
    let disk = FileDisk::new();
    let options =
        GuestOptions { queue_size: 1024, ..GuestOptions::with_disk(disk.daemon.socket()) };
    let guest = boot(options);
    let (count, report) =
        beside(&Upgrades::File(&disk), || finish(&guest, Fio::start(&guest, FIO_SECONDS)));
    let _ = guest.shutdown();
    Ok(say(count, &report))
}

/// The driver is loaded anew with queues that have no interrupt.
pub fn polled() -> Outcome {
    let daemon = memory_disk();
    let guest = boot(GuestOptions::with_disk(daemon.socket()));
    guest.sh("rmmod virtio_blk && insmod /lib/modules/virtio_blk.ko poll_queues=1
        until [ -b /dev/vda ]; do sleep 0.1; done");
    let polling = guest.sh("dmesg | grep -o '[0-9/]* default/read/poll queues' | tail -n 1");
    assert!(polling.starts_with("1/0/1 "), "the guest polls no queue: {polling}");
    let (count, output) = beside(&Upgrades::Memory(&daemon), || {
        guest.run_within(
            &format!(
                "fio --name=polled --filename=/dev/vda --ioengine=io_uring --hipri=1 --direct=1 \
                 --rw=randrw --bs=4k --iodepth=16 --size=16M --time_based \
                 --runtime={FIO_SECONDS} --verify=crc32c --verify_fatal=1 --verify_backlog=256 \
                 --verify_state_save=0 --minimal"
            ),
            Duration::from_secs(90),
        )
    });
    assert_eq!(output.status, 0, "fio failed: {}", output.stdout);
    assert_no_complaints(&guest);
    end(guest, daemon);
    Ok(format!("{count} upgrades; queues: {polling}"))
}

/// The machine stands still, and goes on.
pub fn stop_and_cont() -> Outcome {
    let daemon = memory_disk();
    let guest = boot(GuestOptions::with_disk(daemon.socket()));
    let mut stops = 0;
    let (count, report) = beside(&Upgrades::Memory(&daemon), || {
        let fio = Fio::start(&guest, FIO_SECONDS);
        while fio.is_running() {
            qmp(&guest, "stop", Value::Null);
            thread::sleep(Duration::from_millis(200));
            qmp(&guest, "cont", Value::Null);
            stops += 1;
            thread::sleep(Duration::from_millis(400));
        }
        finish(&guest, fio)
    });
    end(guest, daemon);
    Ok(format!("{stops} stops: {}", say(count, &report)))
}

/// Under I/O, which nothing waits for.
pub fn reset() -> Outcome {
    let daemon = memory_disk();
    let guest = boot(GuestOptions::with_disk(daemon.socket()));
    guest.sh("dd if=/dev/urandom of=/dev/vda bs=1M seek=60 count=2 oflag=direct 2>/dev/null");
    let sum = "dd if=/dev/vda bs=1M skip=60 count=2 iflag=direct 2>/dev/null | sha256sum";
    let before = guest.sh(sum);
    let (count, report) = beside(&Upgrades::Memory(&daemon), || {
        drop(Fio::start(&guest, 60));
        guest.reset().unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(guest.sh(sum), before, "the disk is another after the reset");
        finish(&guest, Fio::start(&guest, FIO_SECONDS))
    });
    end(guest, daemon);
    Ok(say(count, &report))
}

/// A second disk, twice, beside I/O on the first.
pub fn disk_plug() -> Outcome {
    let (first, second) = (memory_disk(), FileDisk::new());
    let guest = boot(GuestOptions {
        extra_args: ["-device", "pcie-root-port,id=rp1,chassis=1"].map(str::to_owned).to_vec(),
        ..GuestOptions::with_disk(first.socket())
    });
    let plugs = 2;
    let (count, report) = beside(&Upgrades::Memory(&first), || {
        let fio = Fio::start(&guest, 30);
        let mut there = 0;
        for _ in 0..plugs {
            plug(&guest, &second);
            let (inner, _) = beside(&Upgrades::File(&second), || {
                Fio::start_on(&guest, "vdb", 3).finish();
                unplug(&guest);
            });
            there += inner;
        }
        assert_no_complaints(&guest);
        (there, finish(&guest, fio))
    });
    end(guest, first);
    let (there, report) = report;
    Ok(format!("{plugs} times, {there} upgrades of it; {}", say(count, &report)))
}

fn plug(guest: &Guest, disk: &FileDisk) {
    let address = json!({"type": "unix", "data": {"path": disk.daemon.socket()}});
    let socket = json!({"type": "socket", "data": {"addr": address, "server": false}});
    qmp(guest, "chardev-add", json!({"id": "late", "backend": socket}));
    qmp(
        guest,
        "device_add",
        json!({"driver": "vhost-user-blk-pci", "id": "late", "chardev": "late", "bus": "rp1",
            "num-queues": 2}),
    );
    guest.sh("for i in $(seq 200); do [ -b /dev/vdb ] && exit; sleep 0.1; done; exit 1");
}

fn unplug(guest: &Guest) {
    qmp(guest, "device_del", json!({"id": "late"}));
    guest.sh("for i in $(seq 300); do [ -b /dev/vdb ] || exit 0; sleep 0.1; done; exit 1");
    // The device goes when the guest has let go of it, and has its socket until then.
    let deadline = Instant::now() + Duration::from_secs(20);
    while let Err(error) = guest.qmp_with("chardev-remove", json!({"id": "late"})) {
        assert!(Instant::now() < deadline, "{error}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// Memory comes while rings run, and requests come from it.
pub fn memory_plug() -> Outcome {
    const MIB: u32 = 512;
    let disk = FileDisk::new();
    let guest = boot(GuestOptions {
        memory_mib: MIB,
        memory_slots: 2,
        ..GuestOptions::with_disk(disk.daemon.socket())
    });
    let total = || -> u64 {
        let text = guest.sh("awk '/MemTotal/ {print $2}' /proc/meminfo");
        text.parse().unwrap_or_else(|_| panic!("no number: {text}"))
    };
    guest.sh("echo online_movable >/sys/devices/system/memory/auto_online_blocks");
    let before = total();
    let (count, report) = beside(&Upgrades::File(&disk), || {
        let fio = Fio::start(&guest, FIO_SECONDS);
        for slot in 1..=2u32 {
            let size = u64::from(MIB) << 20;
            qmp(
                &guest,
                "object-add",
                json!({"qom-type": "memory-backend-memfd", "id": format!("more{slot}"),
                    "size": size, "share": true}),
            );
            qmp(
                &guest,
                "device_add",
                json!({"driver": "pc-dimm", "id": format!("dimm{slot}"),
                    "memdev": format!("more{slot}")}),
            );
            let enough = before + u64::from(slot) * u64::from(MIB) * 1024 * 9 / 10;
            let deadline = Instant::now() + Duration::from_secs(20);
            while total() < enough {
                assert!(Instant::now() < deadline, "the guest does not see the memory");
                thread::sleep(Duration::from_millis(100));
            }
        }
        finish(&guest, fio);
        // What is left of the first memory is not enough for this, so the next buffers lie in the
        // new one as well.
        guest.sh("mkdir -p /run/full && mount -t tmpfs -o size=600M tmpfs /run/full &&
            dd if=/dev/zero of=/run/full/file bs=1M count=500 2>/dev/null");
        finish(&guest, Fio::start(&guest, FIO_SECONDS / 2))
    });
    let after = total();
    let _ = guest.shutdown();
    Ok(format!("{} to {} MiB: {}", before >> 10, after >> 10, say(count, &report)))
}

/// QEMU comes back to a daemon that was restarted; that the server dies it does not notice.
pub fn restart() -> Outcome {
    let mut disk = FileDisk::new();
    let guest =
        boot(GuestOptions { reconnect: Some(1), ..GuestOptions::with_disk(disk.daemon.socket()) });
    let fio = Fio::start(&guest, 3 * FIO_SECONDS / 2);
    let mut times = [0, 0, 0];
    for round in 0.. {
        if !fio.is_running() {
            break;
        }
        match round % 3 {
            0 => kill_server(&disk.daemon),
            1 => {
                assert_eq!(disk.daemon.stop().0, 0, "the daemon's exit code");
                disk.daemon.start_again();
            }
            _ => {
                disk.daemon.call(&["upgrade-daemon"]);
            }
        }
        times[round % 3] += 1;
        thread::sleep(Duration::from_millis(2500));
    }
    let report = finish(&guest, fio);
    let _ = guest.shutdown();
    let [killed, restarted, upgraded] = times;
    Ok(format!(
        "{killed} times the server killed, {restarted} restarts, {upgraded} upgrades of the \
         daemon: longest {} ms",
        report.longest.as_millis()
    ))
}

/// Kills the server, and waits until another one has gone on.
fn kill_server(daemon: &Daemon) {
    let deaths = daemon.status()["server"]["recoveries"].as_u64().unwrap_or(0);
    let pid = i32::try_from(daemon.server_pid()).ok().and_then(Pid::from_raw).expect("a process");
    kill_process(pid, Signal::KILL).expect("the server lives");
    let deadline = Instant::now() + Duration::from_secs(10);
    while daemon.status()["server"]["recoveries"] != deaths + 1 {
        assert!(Instant::now() < deadline, "no other server serves");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A command that must be carried out.
fn qmp(guest: &Guest, command: &str, arguments: Value) {
    if let Err(error) = guest.qmp_with(command, arguments) {
        panic!("{error}");
    }
}
