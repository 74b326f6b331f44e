//! What the guest felt: `fio` with a log of every request, put side by side with what was done to
//! the device.
//!
//! The log's times are the guest's monotonic clock. How far that is from ours is measured through
//! the command channel, before and after; what cannot be known better than the round trip took goes
//! into the verdict on each second: a second counts as quiet only if no change touched it or came
//! within that uncertainty.

use std::time::{Duration, Instant};

use guest_tests::guest::{Guest, Job};
use serde_json::Value;

/// A run of `fio` in the guest, on one disk.
pub struct Run<'guest> {
    guest: &'guest Guest,
    job: Job<'guest>,
    seconds: u64,
    clock: Clock,
}

/// What a run says.
pub struct GuestView {
    /// Reads and writes that `fio` counted.
    pub requests: u64,
    /// How well the guest's clock is known.
    pub uncertain: Duration,
    /// Requests that ended with an error.
    pub errors: u64,
    /// Blocks that were not what was written.
    pub mismatches: u64,
    /// What else `fio` said, if it did not end well.
    pub complaint: String,
    /// Latencies in seconds without a change.
    pub quiet: Latencies,
    /// Latencies in seconds with one at least.
    pub busy: Latencies,
}

/// Some seconds' worth of latencies.
#[derive(Default)]
pub struct Latencies {
    /// How many seconds.
    pub seconds: u64,
    /// Sorted, in nanoseconds.
    pub sorted_ns: Vec<u64>,
}

impl Latencies {
    /// The latency that this share of requests did not exceed.
    pub fn quantile(&self, share: f64) -> Duration {
        let rank = (share * self.sorted_ns.len() as f64).ceil() as usize;
        let index = rank.clamp(1, self.sorted_ns.len().max(1)) - 1;
        Duration::from_nanos(self.sorted_ns.get(index).copied().unwrap_or(0))
    }
}

/// The guest's clock against ours.
#[derive(Clone, Copy)]
struct Clock {
    ours: Instant,
    guest_ms: u64,
    uncertain: Duration,
}

impl Clock {
    /// The best of a few looks.
    fn read(guest: &Guest) -> Self {
        let look = || {
            let before = Instant::now();
            let uptime = guest.sh("cat /proc/uptime");
            let round_trip = before.elapsed();
            let seconds: f64 =
                uptime.split(' ').next().and_then(|word| word.parse().ok()).expect("a number");
            // It was read somewhere between, and it has two decimals.
            Clock {
                ours: before + round_trip / 2,
                guest_ms: (seconds * 1000.0) as u64 + 5,
                uncertain: round_trip / 2 + Duration::from_millis(5),
            }
        };
        (0..5).map(|_| look()).min_by_key(|clock| clock.uncertain).expect("more than none")
    }

    /// Milliseconds of the guest's clock at a moment of ours.
    fn guest_ms(&self, at: Instant) -> f64 {
        let ms = |duration: Duration| duration.as_secs_f64() * 1000.0;
        match at.checked_duration_since(self.ours) {
            Some(later) => self.guest_ms as f64 + ms(later),
            None => self.guest_ms as f64 - ms(self.ours - at),
        }
    }
}

impl<'guest> Run<'guest> {
    /// Starts `fio` on a disk. Two jobs do mixed random 4 KiB requests, 16 deep each, on 32 MiB;
    /// every block carries a checksum and its own offset, and reads check both. A third job, on 16
    /// MiB of its own, has one request at a time, and logs how long each took: a job that checks
    /// lets its requests lie completed while it checks others, so that its latencies say more about
    /// `fio` than about the disk.
    pub fn start(guest: &'guest Guest, disk: &str, seconds: u64) -> Self {
        let witness = "--name=witness --iodepth=16 --numjobs=2 --offset_increment=16M \
             --verify=crc32c --verify_fatal=1 --verify_backlog=256 --verify_state_save=0";
        Self::start_with(guest, disk, seconds, witness)
    }

    /// As [`start`](Self::start), with the third job only.
    pub fn start_probe(guest: &'guest Guest, disk: &str, seconds: u64) -> Self {
        Self::start_with(guest, disk, seconds, "")
    }

    fn start_with(guest: &'guest Guest, disk: &str, seconds: u64, witness: &str) -> Self {
        let clock = Clock::read(guest);
        let job = guest.spawn(&format!(
            "cd /run
             rm -f probe_lat.*.log
             fio --output-format=json --output=fio.json \
             --filename=/dev/{disk} --ioengine=io_uring --direct=1 --rw=randrw --bs=4k --size=16M \
             --time_based --runtime={seconds} \
             {witness} \
             --name=probe --iodepth=1 --offset=32M --nice=-10 --write_lat_log=probe --disable_slat=1 \
             --disable_clat=1 --log_alternate_epoch=1 --log_alternate_epoch_clock_id=1 2>fio.err
             status=$?
             cat fio.json fio.err
             exit $status"
        ));
        Run { guest, job, seconds, clock }
    }

    /// Whether requests are still coming.
    pub fn is_running(&self) -> bool {
        !self.job.has_ended()
    }

    /// Waits for the end, and sorts every request by whether its second saw one of `changes`.
    pub fn finish(self, changes: &[(Instant, Instant)]) -> GuestView {
        let Self { guest, job, seconds, clock } = self;
        let output = job.wait(Duration::from_secs(seconds * 2 + 60));
        let mut view = GuestView {
            requests: 0,
            uncertain: Duration::ZERO,
            errors: 0,
            mismatches: 0,
            complaint: String::new(),
            quiet: Latencies::default(),
            busy: Latencies::default(),
        };
        for job in jobs(&output.stdout) {
            let count = |direction: &str| job[direction]["total_ios"].as_u64().unwrap_or(0);
            view.requests += count("read") + count("write");
        }
        // `fio` ends with the first of either, and says so in words.
        let said = output.stdout.lines().filter(|line| {
            !line.contains("\" : ") && (line.contains("fio:") || line.contains("verify"))
        });
        let said: Vec<&str> = said.filter(|line| !line.contains("multiple writers")).collect();
        view.mismatches = said
            .iter()
            .filter(|line| line.contains("verify:") || line.contains("verify failed"))
            .count() as u64;
        view.errors = said.iter().filter(|line| line.contains("io_u error")).count() as u64;
        if output.status != 0 {
            view.complaint = format!("fio exited with {}: {}", output.status, said.join("; "));
        }
        view.sort(guest, clock, seconds, changes);
        view
    }
}

impl GuestView {
    /// Puts every logged request on one side or the other.
    fn sort(&mut self, guest: &Guest, clock: Clock, seconds: u64, changes: &[(Instant, Instant)]) {
        let after = Clock::read(guest);
        let drift = (clock.guest_ms(after.ours) - after.guest_ms as f64).abs();
        let uncertain = clock.uncertain.as_secs_f64() * 1000.0 + drift;
        let log = guest.run_within("cat /run/probe_lat.*.log", Duration::from_secs(60)).stdout;
        let entries: Vec<(u64, u64)> = log
            .lines()
            .filter_map(|line| {
                let mut fields = line.split(", ");
                Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
            })
            .collect();
        self.uncertain = Duration::from_secs_f64(uncertain / 1000.0);
        let Some(first_ms) = entries.iter().map(|&(ms, _)| ms).min() else { return };
        let second = |ms: u64| ((ms - first_ms) / 1000) as usize;
        // `fio` warms up in the first second, and ends at any moment of the last one.
        let judged = 1..seconds as usize;
        let is_busy: Vec<bool> = (0..seconds as usize)
            .map(|index| {
                let from = (first_ms + 1000 * index as u64) as f64 - uncertain;
                let to = (first_ms + 1000 * (index as u64 + 1)) as f64 + uncertain;
                changes
                    .iter()
                    .any(|&(start, end)| clock.guest_ms(end) >= from && clock.guest_ms(start) <= to)
            })
            .collect();
        for (ms, latency_ns) in entries {
            let index = second(ms);
            if judged.contains(&index) {
                let side = if is_busy[index] { &mut self.busy } else { &mut self.quiet };
                side.sorted_ns.push(latency_ns);
            }
        }
        for index in judged {
            let side = if is_busy[index] { &mut self.busy } else { &mut self.quiet };
            side.seconds += 1;
        }
        self.quiet.sorted_ns.sort_unstable();
        self.busy.sorted_ns.sort_unstable();
    }
}

/// The jobs of `fio`'s report, which has words before and after it.
fn jobs(output: &str) -> Vec<Value> {
    let report = output.find("{\n").and_then(|start| {
        let mut stream = serde_json::Deserializer::from_str(&output[start..]).into_iter::<Value>();
        stream.next()?.ok()
    });
    report
        .and_then(|mut report| report["jobs"].as_array_mut().map(std::mem::take))
        .unwrap_or_default()
}
