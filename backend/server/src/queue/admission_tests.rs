use super::super::tests::Bench;
use crate::testing::{Kind, NONE};
use control::messages::LimitRequest;
use std::time::{Duration, Instant};

#[test]
fn what_is_not_let_through_stays_in_the_ring_and_goes_on_later() {
    let mut bench = Bench::new(&[]);
    let one = LimitRequest { iops: Some(1), ..LimitRequest::default() };
    bench.limiter.change(&one).expect("a limit");
    bench.guest.reads(0..3);
    let began = Instant::now();
    bench.serve();
    let until = bench.worker.throttled().expect("two wait");
    assert!(until <= began + Duration::from_secs(2), "{:?}", until - began);
    assert_eq!((bench.guest.used_idx(), bench.worker.awaited()), (1, 0));
    assert_eq!((bench.guest.status(0), bench.guest.status(1)), (0, NONE));
    // Nothing is let through before its time, and a ring with what waits is not broken.
    for _ in 0..3 {
        bench.serve();
        assert!(bench.worker.throttled().is_some());
    }
    // A flush stands behind, and is free, but comes in its turn.
    let flush = bench.guest.request(3, Kind::Flush);
    bench.guest.offer(flush);
    bench.serve();
    assert_eq!(bench.guest.status(3), NONE);
    bench.limiter.change(&LimitRequest { off: true, ..one }).expect("one");
    bench.limiter.change(&LimitRequest { iops: Some(0), ..one }).expect("none");
    bench.serve();
    assert_eq!((bench.guest.used_idx(), bench.worker.throttled()), (4, None));
    assert_eq!(bench.got("a").len(), 4, "each was offered once");
}

#[test]
fn a_flush_passes_when_nothing_else_does() {
    let mut bench = Bench::new(&[]);
    let one = LimitRequest { iops: Some(1), ..LimitRequest::default() };
    bench.limiter.change(&one).expect("a limit");
    bench.guest.reads(0..1);
    bench.serve();
    let flush = bench.guest.request(1, Kind::Flush);
    bench.guest.offer(flush);
    bench.guest.reads(2..3);
    bench.serve();
    let statuses = [0, 1, 2].map(|n| bench.guest.status(n));
    assert_eq!(statuses, [0, 0, NONE]);
}
