//! What a session is told once more, or anew, while it lasts.

use super::*;

#[test]
fn a_worker_that_serves_while_a_log_is_turned_on_and_off_hears_of_a_larger_disk() {
    const LOG_ALL: u64 = 1 << 26;
    let bench = Bench::new(&[]);
    let offer = &bench.context().offer;
    bench.backend.acked_features(features::FLUSH);
    let limits = offer.limits();
    let mut expected = 1 << 20;
    for log in [LOG_ALL, 0] {
        bench.backend.acked_features(features::FLUSH | log);
        expected *= 2;
        bench.puppets.proxy.resize(expected, proxy::Options::default()).unwrap();
        assert_eq!(bench.backend.get_config(0, 8), (expected / 512).to_le_bytes());
        assert_eq!(limits.capacity.get(), expected, "its requests would end with an error");
        assert_eq!(offer.limits().capacity.get(), expected);
    }
}

#[test]
fn a_ring_that_is_given_another_size_has_its_marks_taken_up_anew() {
    let mut bench = Bench::new(&[]);
    bench.submit(0..1);
    let version = || bench.context().config.inflight.version();
    bench.run(|| {
        until("an answer", || bench.guest.used_idx() == 1);
        let before = version();
        bench.vring.set_queue_size(SIZE / 2);
        assert_eq!(version(), before, "it runs, and keeps its size");
        bench.vring.set_enabled(false);
        bench.vring.set_queue_size(SIZE / 2);
        assert_ne!(version(), before);
    });
}

/// Its driver is another, or the same anew, and begins with an empty used ring at the same place.
#[test]
fn a_ring_that_was_reset_goes_on_where_its_driver_is() {
    let mut bench = Bench::new(&[]);
    bench.submit(0..1);
    let next_used = || bench.vring.get_ref().get_queue().next_used();
    let set_up = |base| {
        let (table, avail, used) = testing::ADDRESSES;
        bench.vring.set_queue_next_avail(base);
        bench.vring.set_queue_info(table, avail, used).expect("addresses");
        // As the library does.
        bench.vring.set_queue_next_used(bench.vring.queue_used_idx().expect("an index"));
    };
    bench.run(|| {
        until("an answer", || bench.guest.used_idx() == 1);
        assert_eq!(bench.control().wait_drained(in_time()), Outcome::Clean);
        bench.guest.write(testing::USED + 2, 0_u16);
        set_up(1);
        assert_eq!(next_used(), 1, "it runs: what is in its ring may be old");
        bench.vring.set_enabled(false);
        bench.backend.reset_device();
        set_up(0);
        assert_eq!(next_used(), 0);
        // It was reset once.
        bench.guest.write(testing::USED + 2, 7_u16);
        set_up(0);
        assert_eq!(next_used(), 0);
        // One that was stopped before it was reset is not found running when it is set up.
        bench.vring.set_queue_ready(false);
        bench.backend.reset_device();
        bench.guest.write(testing::USED + 2, 0_u16);
        set_up(0);
        bench.vring.set_queue_ready(true);
        bench.guest.write(testing::USED + 2, 7_u16);
        set_up(0);
        assert_eq!(next_used(), 0, "it runs since, so what is in its ring may be old");
    });
}
