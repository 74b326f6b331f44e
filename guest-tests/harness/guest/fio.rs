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
    /// How the names of its files begin.
    files: String,
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
        let load = "--bs=4k --rw=randrw --numjobs=2 --size=16M --offset_increment=16M \
                    --verify_backlog=256";
        Self::start_with(guest, disk, seconds, load)
    }

    /// As [`start_on`](Self::start_on), on a disk or a partition, with requests of the caller's
    /// choice: options of `fio`.
    #[track_caller]
    pub fn start_with(guest: &'guest Guest, disk: &str, seconds: u32, load: &str) -> Self {
        Self::spawn(guest, disk, "witness", seconds, load)
    }

    #[track_caller]
    fn spawn(guest: &'guest Guest, disk: &str, name: &str, seconds: u32, load: &str) -> Self {
        // Another run may be on the disk, and only one of them writes.
        let progress = || {
            let (reads, writes) = answered(guest, disk);
            if name == READER { reads } else { writes }
        };
        let before = progress();
        let files = format!("/run/fio-{name}-{disk}");
        // A job that checks what it reads ends after one round, whatever time there is. One that
        // was told to end says so with 128, and has counted and checked all the same.
        let job = guest.spawn(&format!(
            "rm -f {files}.enough
             end=$(($(date +%s) + {seconds}))
             while :; do
             fio --name={name} --filename=/dev/{disk} --ioengine=io_uring --direct=1 \
             --iodepth=16 {load} --time_based --runtime={seconds} \
             --verify=crc32c --verify_fatal=1 --verify_state_save=0 --group_reporting \
             --output-format=json --output={files}.json &
             echo $! >{files}.pid
             wait $!
             status=$?
             [ ! -e {files}.enough ] || [ $status -ne 128 ] || status=0
             [ $status -eq 0 ] && [ ! -e {files}.enough ] && [ $(date +%s) -lt $end ] || break
             done
             cat {files}.json
             exit $status"
        ));
        let deadline = Instant::now() + START;
        while progress() < before + 50 {
            assert!(Instant::now() < deadline, "fio does no I/O: {}", guest.sh("dmesg"));
            if job.has_ended() {
                panic!("fio ended at once: {:?}", job.wait(Duration::ZERO));
            }
        }
        Fio { guest, disk: disk.to_owned(), files, job, seconds }
    }

    /// Requests that the guest has completed on the disk since its driver was bound.
    pub fn requests(&self) -> u64 {
        let (reads, writes) = answered(self.guest, &self.disk);
        reads + writes
    }

    /// Starts a job that reads at random what [`fill`] has written to the 16 MiB from 32 MiB on, 16
    /// deep, and checks it, and comes back when it has done I/O. It writes nothing, neither to the
    /// disk nor to its buffers: what is in them has come from the device.
    #[track_caller]
    pub fn start_reading(guest: &'guest Guest, disk: &str, seconds: u32) -> Self {
        Self::spawn(guest, disk, READER, seconds, &format!("--bs=4k --rw=randread {PREPARED}"))
    }

    /// Ends the run as its time does, for a test that has seen what it wanted to see under it: what
    /// is in flight is awaited and checked. One that only reads ends with its round.
    #[track_caller]
    pub fn enough(&self) {
        let files = &self.files;
        // Where rounds are short, a new `fio` may not have begun to listen to signals.
        let end = if files.contains(READER) { "true" } else { "kill -TERM $(cat $files.pid)" };
        self.guest.sh(&format!("files={files}; touch $files.enough; {end} || true"));
    }

    /// Waits until so many more requests have been answered, for what comes next to come under I/O.
    #[track_caller]
    pub fn wait_for_requests(&self, more: u64) {
        let (before, deadline) = (self.requests(), Instant::now() + START);
        while self.requests() < before + more {
            assert!(self.is_running(), "fio has ended before");
            assert!(Instant::now() < deadline, "fio does no I/O: {}", self.guest.sh("dmesg"));
        }
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

/// The job of [`Fio::start_reading`].
const READER: &str = "reader";

/// What [`Fio::start_reading`] reads.
const PREPARED: &str = "--offset=32M --size=16M";

/// Writes what [`Fio::start_reading`] reads.
#[track_caller]
pub fn fill(guest: &Guest, disk: &str) {
    guest.sh(&format!(
        "fio --name={READER} --filename=/dev/{disk} --ioengine=io_uring --direct=1 --bs=4k \
         --iodepth=16 --rw=write {PREPARED} --verify=crc32c --do_verify=0 --verify_state_save=0"
    ));
}

/// Reads and writes that the guest has completed on a disk or a partition since its driver was
/// bound.
fn answered(guest: &Guest, disk: &str) -> (u64, u64) {
    let statistics = guest.sh(&format!("cat /sys/class/block/{disk}/stat"));
    let field = |index| {
        statistics.split_whitespace().nth(index).and_then(|word: &str| word.parse::<u64>().ok())
    };
    // Documentation/block/stat.rst in the kernel's sources: reads, ..., writes in the fifth.
    field(0).zip(field(4)).unwrap_or_else(|| panic!("not statistics: {statistics}"))
}
