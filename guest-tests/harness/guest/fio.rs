//! `fio` in the guest, as the witness: it stamps what it writes and checks what it reads.
//!
//! Every block carries a checksum and its own offset, so a lost, torn, misplaced or stale write is
//! found, and the first one ends the run with an error. Checking goes on all the while
//! (`verify_backlog`) and again at the end.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Guest, Job, Output};

/// How long it may take until a run does I/O.
const START: Duration = Duration::from_secs(60);

/// A verifying run that was started in a guest.
pub struct Fio<'guest> {
    guest: &'guest Guest,
    disk: String,
    job: Job<'guest>,
    seconds: u32,
}

/// What a run did, over all its jobs.
#[derive(Debug)]
pub struct FioReport {
    /// Reads, those that checked a write included.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// The longest any request took.
    pub longest: Duration,
}

impl<'guest> Fio<'guest> {
    /// Starts two jobs of mixed random 4 KiB requests, 16 deep each, on the two halves of the first
    /// 32 MiB of `/dev/vda`, and comes back when they have done I/O.
    #[track_caller]
    pub fn start(guest: &'guest Guest, seconds: u32) -> Self {
        Self::start_on(guest, "vda", seconds)
    }

    /// As [`start`](Self::start), on another disk. One run at a time on each.
    #[track_caller]
    pub fn start_on(guest: &'guest Guest, disk: &str, seconds: u32) -> Self {
        let load = "--rw=randrw --numjobs=2 --size=16M --offset_increment=16M --verify_backlog=256";
        Self::spawn(guest, disk, "witness", seconds, load)
    }

    #[track_caller]
    fn spawn(guest: &'guest Guest, disk: &str, name: &str, seconds: u32, load: &str) -> Self {
        let before = requests(guest, disk);
        // A job that checks what it reads ends after one round, whatever time there is.
        let job = guest.spawn(&format!(
            "end=$(($(date +%s) + {seconds}))
             while :; do
             fio --name={name} --filename=/dev/{disk} --ioengine=io_uring --direct=1 --bs=4k \
             --iodepth=16 {load} --time_based --runtime={seconds} \
             --verify=crc32c --verify_fatal=1 --verify_state_save=0 --group_reporting \
             --output-format=json --output=/run/fio-{name}-{disk}.json
             status=$?
             [ $status -eq 0 ] && [ $(date +%s) -lt $end ] || break
             done
             cat /run/fio-{name}-{disk}.json
             exit $status"
        ));
        let deadline = Instant::now() + START;
        while requests(guest, disk) < before + 100 {
            assert!(Instant::now() < deadline, "fio does no I/O: {}", guest.sh("dmesg"));
            if job.has_ended() {
                panic!("fio ended at once: {:?}", job.wait(Duration::ZERO));
            }
        }
        Fio { guest, disk: disk.to_owned(), job, seconds }
    }

    /// Requests that the guest has completed on the disk since its driver was bound.
    pub fn requests(&self) -> u64 {
        requests(self.guest, &self.disk)
    }

    /// Starts a job that reads at random what [`fill`] has written to the 16 MiB from 32 MiB on, 16
    /// deep, and checks it, and comes back when it has done I/O. It writes nothing, neither to the
    /// disk nor to its buffers: what is in them has come from the device.
    #[track_caller]
    pub fn start_reading(guest: &'guest Guest, disk: &str, seconds: u32) -> Self {
        Self::spawn(guest, disk, "reader", seconds, &format!("--rw=randread {PREPARED}"))
    }

    /// Whether requests are still coming.
    pub fn is_running(&self) -> bool {
        !self.job.has_ended()
    }

    /// Waits for the end; the exit status and output as they are, for those who expect a failure.
    #[track_caller]
    pub fn wait(self) -> Output {
        self.job.wait(Duration::from_secs(u64::from(self.seconds) * 2 + 60))
    }

    /// Waits for the end, which must be free of errors and wrong blocks.
    #[track_caller]
    pub fn finish(self) -> FioReport {
        let report = self.finish_reading();
        assert!(
            report.reads > 100 && report.writes > 100,
            "hardly anything was tested: {report:?}"
        );
        report
    }

    /// As [`finish`](Self::finish), of a job that only reads.
    #[track_caller]
    pub fn finish_reading(self) -> FioReport {
        let output = self.wait();
        assert_eq!(output.status, 0, "fio failed: {}", output.stdout);
        let report = &output.stdout[output.stdout.find('{').expect("a JSON report")..];
        let report: Value = serde_json::from_str(report).expect("a JSON report");
        let job = &report["jobs"][0];
        assert_eq!(job["error"], 0, "{report}");
        let number = |value: &Value| {
            value.as_u64().unwrap_or_else(|| panic!("a number is missing: {report}"))
        };
        let longest_ns =
            number(&job["read"]["clat_ns"]["max"]).max(number(&job["write"]["clat_ns"]["max"]));
        let report = FioReport {
            reads: number(&job["read"]["total_ios"]),
            writes: number(&job["write"]["total_ios"]),
            longest: Duration::from_nanos(longest_ns),
        };
        assert!(report.reads > 100, "hardly anything was tested: {report:?}");
        report
    }
}

/// What [`Fio::start_reading`] reads.
const PREPARED: &str = "--offset=32M --size=16M";

/// Writes what [`Fio::start_reading`] reads.
#[track_caller]
pub fn fill(guest: &Guest, disk: &str) {
    guest.sh(&format!(
        "fio --name=reader --filename=/dev/{disk} --ioengine=io_uring --direct=1 --bs=4k \
         --iodepth=16 --rw=write {PREPARED} --verify=crc32c --do_verify=0 --verify_state_save=0"
    ));
}

/// Requests that the guest has completed on a disk since the driver was bound.
fn requests(guest: &Guest, disk: &str) -> u64 {
    let statistics = guest.sh(&format!("cat /sys/block/{disk}/stat"));
    let field = |index| {
        statistics.split_whitespace().nth(index).and_then(|word: &str| word.parse::<u64>().ok())
    };
    // Documentation/block/stat.rst in the kernel's sources: reads, ..., writes in the fifth.
    field(0)
        .zip(field(4))
        .map_or_else(|| panic!("not statistics: {statistics}"), |(reads, writes)| reads + writes)
}
