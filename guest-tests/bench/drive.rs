//! The load: one thread that keeps a queue at a given depth, and times every request.
//!
//! The clock is read once per round of completions, and the new requests count from that reading;
//! so a latency is from before the request is written until after its answer was seen, and includes
//! the client's own work on the others of its round.
//!
//! A device that stops answering ends a run as an error. The sleeping client sleeps without a
//! limit, because a timer would cost it a system call per request; a watcher wakes it instead.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::cpu;
use crate::histogram::Histogram;
use guest_tests::client::fast::{FastQueue, Waker};
use guest_tests::client::{Client, Options};

/// How much longer than planned a run may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Descriptors per request, rounded up to a power of two.
const CHAIN: usize = 4;

/// How the client learns of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// It looks at the used ring all the time, and has notifications off.
    Polled,
    /// It sleeps on the call descriptor.
    Sleeping,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mix {
    Read,
    Write,
    /// Half of each, at random.
    Mixed,
}

/// What a client does.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub depth: usize,
    pub wait: Wait,
    pub bytes: usize,
    pub mix: Mix,
}

/// What a run found.
pub(super) struct Measured {
    pub ios: u64,
    pub failed: u64,
    pub seconds: f64,
    pub latency: Histogram,
    /// The longest time in which nothing was answered.
    pub longest_gap_ns: u64,
    /// CPU time of the client's thread.
    pub client_seconds: f64,
    /// When each request ended, since the driver's epoch, and how long it took; only if asked for.
    pub trace: Vec<(u64, u64)>,
    /// It was stopped from outside, with requests in flight.
    pub aborted: bool,
}

impl Measured {
    pub(super) fn iops(&self) -> f64 {
        self.ios as f64 / self.seconds
    }
}

/// Ends a run before its time.
#[derive(Clone)]
pub(super) struct Stop {
    flag: Arc<AtomicBool>,
    waker: Waker,
}

impl Stop {
    pub(super) fn now(&self) {
        self.flag.store(true, Ordering::Relaxed);
        self.waker.wake();
    }
}

/// A connected client with a load to put on one queue.
pub(super) struct Driver {
    queue: FastQueue,
    load: Load,
    blocks: u64,
    random: u64,
    epoch: Instant,
    started: Vec<u64>,
    done: Vec<u16>,
    stop: Stop,
}

impl Driver {
    /// Connects.
    pub(super) fn connect(socket: &Path, load: Load) -> io::Result<Driver> {
        Driver::connect_at(socket, load, Instant::now())
    }

    /// Connects; traces count from `epoch`.
    pub(super) fn connect_at(socket: &Path, load: Load, epoch: Instant) -> io::Result<Driver> {
        let mut drivers = Driver::connect_all(socket, load, 1, epoch)?;
        drivers.pop().ok_or_else(|| io::Error::other("no queue"))
    }

    /// Connects; each of the `queues` has a driver of its own.
    pub(super) fn connect_queues(
        socket: &Path,
        load: Load,
        queues: usize,
    ) -> io::Result<Vec<Driver>> {
        Driver::connect_all(socket, load, queues, Instant::now())
    }

    fn connect_all(
        socket: &Path,
        load: Load,
        queues: usize,
        epoch: Instant,
    ) -> io::Result<Vec<Driver>> {
        let queue_size = (load.depth * CHAIN).next_power_of_two().max(64) as u16;
        let options =
            Options { queues, queue_size, slot_bytes: load.bytes.max(4096), ..Options::default() };
        let client = Client::connect(socket, &options)?;
        let blocks = client.capacity() / load.bytes as u64;
        let driver = |(index, queue)| {
            let queue = FastQueue::new(queue, load.depth)?;
            let stop = Stop { flag: Arc::default(), waker: queue.waker() };
            Ok(Driver {
                queue,
                load,
                blocks,
                random: 0x9e37_79b9_7f4a_7c15 + index as u64,
                epoch,
                started: vec![0; load.depth],
                done: Vec::with_capacity(load.depth),
                stop,
            })
        };
        client.into_queues().into_iter().enumerate().map(driver).collect()
    }

    /// What traces count from.
    pub(super) const fn epoch(&self) -> Instant {
        self.epoch
    }

    /// To end a run from outside.
    pub(super) fn stop(&self) -> Stop {
        self.stop.clone()
    }

    /// When the oldest request that is still in flight was submitted, since the epoch.
    pub(super) fn oldest_in_flight(&self) -> Option<u64> {
        (self.queue.in_flight() > 0).then(|| self.started.iter().copied().min().unwrap_or(0))
    }

    /// Runs for a time, on a thread of its own, while `beside` runs on this one.
    pub(super) fn run_beside<T>(
        &mut self,
        time: Duration,
        traced: bool,
        cpu: Option<usize>,
        beside: impl FnOnce() -> T,
    ) -> io::Result<(Measured, T)> {
        let stop = self.stop();
        let (sender, receiver) = mpsc::channel();
        thread::scope(|scope| {
            let deadline = Instant::now() + time + PATIENCE;
            let guard = StopOnPanic(stop.clone());
            thread::Builder::new().name("bench-client".to_owned()).spawn_scoped(
                scope,
                move || {
                    let measured = cpu::pinned(cpu, || self.run(time, traced));
                    // The receiver waits for it.
                    let _ = sender.send(measured);
                },
            )?;
            let result = beside();
            let measured =
                receiver.recv_timeout(deadline.saturating_duration_since(Instant::now()));
            let measured = measured.or_else(|_| {
                stop.now();
                receiver.recv()
            });
            drop(guard);
            let measured = measured.map_err(io::Error::other)??;
            Ok((measured, result))
        })
    }

    /// Runs for a time; a run that does not end is an error.
    pub(super) fn run_for(&mut self, time: Duration, cpu: Option<usize>) -> io::Result<Measured> {
        let (measured, ()) = self.run_beside(time, false, cpu, || {})?;
        if measured.aborted {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "requests stay unanswered"));
        }
        if measured.failed > 0 {
            return Err(io::Error::other(format!("{} requests have failed", measured.failed)));
        }
        Ok(measured)
    }

    /// A short run that does not count: memory is touched, caches and branch predictors learn.
    pub(super) fn warm_up(&mut self, cpu: Option<usize>) -> io::Result<()> {
        self.run_for(Duration::from_millis(200), cpu).map(drop)
    }

    /// Writes the whole disk once, in large pieces and in order; for disks that begin as holes.
    pub(super) fn fill(socket: &Path) -> io::Result<()> {
        let load = Load { depth: 8, wait: Wait::Sleeping, bytes: 1 << 20, mix: Mix::Write };
        let mut driver = Driver::connect(socket, load)?;
        let sectors = (load.bytes / 512) as u64;
        let mut free: Vec<u16> = (0..load.depth as u16).collect();
        let mut next = 0;
        while next < driver.blocks || driver.queue.in_flight() > 0 {
            while next < driver.blocks
                && let Some(slot) = free.pop()
            {
                driver.queue.submit(slot, true, next * sectors, load.bytes)?;
                next += 1;
            }
            driver.queue.kick()?;
            driver.queue.sleep()?;
            if driver.queue.reap(&mut free) > 0 {
                return Err(io::Error::other("a write has failed"));
            }
        }
        Ok(())
    }

    /// How many requests per second this client could make if the device took no time at all.
    ///
    /// The device that it is connected to does not notice, so it cannot be used afterwards.
    pub(super) fn ceiling(mut self, time: Duration) -> io::Result<f64> {
        let mut measured = self.blank(false);
        let begin = Instant::now();
        (0..self.load.depth as u16).try_for_each(|slot| self.submit(slot))?;
        while begin.elapsed() < time {
            for _ in 0..100 {
                self.queue.answer_ourselves();
                self.round(&mut measured, true)?;
            }
        }
        Ok(measured.ios as f64 / begin.elapsed().as_secs_f64())
    }

    fn blank(&self, traced: bool) -> Measured {
        Measured {
            ios: 0,
            failed: 0,
            seconds: 0.0,
            latency: Histogram::new(),
            longest_gap_ns: 0,
            client_seconds: 0.0,
            trace: Vec::with_capacity(if traced { 1 << 20 } else { 0 }),
            aborted: false,
        }
    }

    fn now(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }

    #[inline]
    fn submit(&mut self, slot: u16) -> io::Result<()> {
        // xorshift64 (Marsaglia).
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let write = match self.load.mix {
            Mix::Read => false,
            Mix::Write => true,
            Mix::Mixed => self.random & 1 == 1,
        };
        // The high half, scaled: no division.
        let block = ((self.random >> 32) * self.blocks) >> 32;
        self.queue.submit(slot, write, block * (self.load.bytes / 512) as u64, self.load.bytes)
    }

    /// Takes what is answered, and asks again if `more`. Says when that was, if there was anything.
    #[inline]
    fn round(&mut self, measured: &mut Measured, more: bool) -> io::Result<Option<u64>> {
        self.done.clear();
        measured.failed += self.queue.reap(&mut self.done);
        if self.done.is_empty() {
            return Ok(None);
        }
        let now = self.now();
        for index in 0..self.done.len() {
            let slot = self.done[index];
            let latency = now - self.started[usize::from(slot)];
            measured.latency.record(latency);
            if measured.trace.capacity() > 0 {
                measured.trace.push((now, latency));
            }
            self.started[usize::from(slot)] = now;
            if more {
                self.submit(slot)?;
            } else {
                self.started[usize::from(slot)] = u64::MAX;
            }
        }
        measured.ios += self.done.len() as u64;
        Ok(Some(now))
    }

    fn run(&mut self, time: Duration, traced: bool) -> io::Result<Measured> {
        let mut measured = self.blank(traced);
        let cpu_before = cpu::thread_seconds();
        let begin = self.now();
        let end = begin + time.as_nanos() as u64;
        for slot in 0..self.load.depth as u16 {
            self.started[usize::from(slot)] = begin;
            self.submit(slot)?;
        }
        self.queue.kick()?;
        let mut last = begin;
        while last < end {
            if let Some(now) = self.round(&mut measured, true)? {
                measured.longest_gap_ns = measured.longest_gap_ns.max(now - last);
                last = now;
                self.queue.kick()?;
            } else if self.pause()? {
                measured.aborted = true;
                break;
            }
        }
        measured.seconds = (last.max(begin + 1) - begin) as f64 / 1e9;
        measured.client_seconds = cpu::thread_seconds() - cpu_before;
        let mut rest = self.blank(false);
        while !measured.aborted && self.queue.in_flight() > 0 {
            if self.round(&mut rest, false)?.is_none() {
                measured.aborted = self.pause()?;
            }
        }
        measured.failed += rest.failed;
        Ok(measured)
    }

    /// Nothing was there: looks again soon, or sleeps. Says whether the run is to end.
    #[inline]
    fn pause(&mut self) -> io::Result<bool> {
        match self.load.wait {
            Wait::Polled => std::hint::spin_loop(),
            Wait::Sleeping => self.queue.sleep()?,
        }
        Ok(self.stop.flag.load(Ordering::Relaxed))
    }
}

/// The thread that runs a load may sleep for ever when the device is gone; a panic beside it must
/// not wait for that.
struct StopOnPanic(Stop);

impl Drop for StopOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.now();
        }
    }
}
