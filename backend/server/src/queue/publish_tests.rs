use super::super::tests::Bench;
use crate::testing::Kind;
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

#[test]
fn what_cannot_be_logged_is_told_of_at_once_though_the_queue_stays_busy() {
    let mut bench = Bench::new(&[]);
    let told = Arc::new(AtomicUsize::new(0));
    bench.phase.on_unlogged({
        let told = Arc::clone(&told);
        move || _ = told.fetch_add(1, Ordering::Relaxed)
    });
    let heads: Vec<_> = (0..10).map(|n| bench.guest.request(n, Kind::Read(512))).collect();
    // There is no bitmap.
    bench.phase.turn_log(true);
    let (rounds, told_after) = (Cell::new(0), Cell::new(None));
    bench.serve_with(|guest| {
        let round = rounds.replace(rounds.get() + 1);
        if told.load(Ordering::Relaxed) > 0 && told_after.get().is_none() {
            told_after.set(Some(round));
        }
        let is_over = round == 100;
        if !is_over {
            // The one before has been answered.
            guest.put(round, heads[usize::from(round) % heads.len()]);
        }
        is_over
    });
    assert_eq!((told_after.get(), bench.guest.used_idx()), (Some(1), 100));
}
