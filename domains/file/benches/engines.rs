//! How fast the disk is without anything around it: `cargo bench -p domain-file`.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{Raw, image_in, params, real_dir};
use domain_abi::op;
use domain_api::QueueIndex;
use domain_conformance::{Bench, TestStorage};
use domain_file::FileDisk;
use domain_host::CompletionBuffer;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

const SIZE: u64 = 256 << 20;
const BLOCK: usize = 4096;
const RUN: Duration = Duration::from_millis(1500);

fn cpu_time() -> Duration {
    let mut used = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: room for the result. The process's clock, so that what kernel threads of ours use is
    // counted too.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut used) };
    Duration::new(used.tv_sec as u64, used.tv_nsec as u32)
}

/// Requests per second and CPU microseconds for each, with `depth` in flight by a worker that
/// sleeps when it has nothing to do.
fn measure(bench: &Bench, op: u32, depth: usize) -> (f64, f64) {
    let queue = QueueIndex(0);
    let mut handle = bench.instance.attach(queue).unwrap();
    let mut raw = Raw::new(op, 8192, BLOCK, SIZE);
    let requests = raw.requests();
    let mut completions = CompletionBuffer::new(depth);
    let (started, cpu) = (Instant::now(), cpu_time());
    let (mut next, mut in_flight, mut done) = (0, 0, 0u64);
    let mut asleep_since = None;
    while started.elapsed() < RUN || in_flight > 0 {
        let mut ended = 0;
        if started.elapsed() < RUN && in_flight < depth {
            let count = (depth - in_flight).min(requests.len() - next);
            let accepted = handle.submit(&requests[next..next + count], &mut completions).unwrap();
            next = (next + accepted) % requests.len();
            in_flight += accepted;
            ended += completions.completed().len();
        }
        if in_flight > ended {
            handle.reap(&mut completions).unwrap();
            ended += completions.completed().len();
        }
        in_flight -= ended;
        done += ended as u64;
        // As a worker does: look again after having noted how often the bell rang, and only then
        // sleep.
        asleep_since = match asleep_since {
            _ if ended > 0 => None,
            None => Some(bench.host.notifications(queue)),
            Some(seen) => {
                let _ = bench.host.wait_notified(
                    queue,
                    seen,
                    Instant::now() + Duration::from_millis(100),
                );
                None
            }
        };
    }
    let time = started.elapsed().as_secs_f64();
    (done as f64 / time, (cpu_time() - cpu).as_secs_f64() * 1e6 / done as f64)
}

fn main() {
    let places: [(&str, &Path, &[&str]); 3] = [
        ("tmpfs", Path::new("/dev/shm"), &[]),
        ("page cache", &real_dir(), &[]),
        ("direct", &real_dir(), &["direct=true"]),
    ];
    for (place, dir, more) in places {
        let image = image_in(dir, SIZE);
        // Block by block, as a guest would have; one large write makes large folios, in which ext4
        // takes its time for a small one.
        for block in 0..SIZE / BLOCK as u64 {
            image.as_file().write_all_at(&[0x5a; BLOCK], block * BLOCK as u64).unwrap();
        }
        image.as_file().sync_all().unwrap();
        for aio in ["aio=sync", "aio=io_uring"] {
            let params = params(image.path(), &[&[aio], more].concat());
            let bench = Bench::activated::<FileDisk>(&TestStorage::new(), &params).unwrap();
            for (name, op) in [("read", op::READ), ("write", op::WRITE)] {
                for depth in [1, 32] {
                    let (rate, cpu) = measure(&bench, op, depth);
                    println!(
                        "{place:10} {aio:12} {name:5} depth {depth:2}: {rate:9.0}/s, {cpu:5.2} us of CPU each"
                    );
                }
            }
        }
    }
}
