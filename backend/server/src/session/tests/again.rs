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
