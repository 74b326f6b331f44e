//! Handovers with a number of sleeping readers, to be counted: `valgrind --tool=callgrind BENCH
//! SLOTS HANDOVERS`.
//!
//! Two runs that differ in the number of handovers differ by what these handovers take. Without
//! arguments, as `cargo bench` runs it, it only shows that it works. Threads are left out on
//! purpose: the readers all belong to this one, and are claimed where they sleep, as a device's
//! idle queues are.
#![cfg(not(loom))]

use srcu::{Asleep, Cell, Handover};
use std::sync::Arc;
use std::time::Duration;

fn main() {
    let number = |at: usize, otherwise| {
        std::env::args().nth(at).and_then(|text| text.parse().ok()).unwrap_or(otherwise)
    };
    let (slots, handovers) = (number(1, 8), number(2, 10));
    let cell: Arc<Cell<usize>> = Cell::new(0, slots);
    let mut readers: Vec<_> = (0..slots).map(|_| cell.attach().expect("a slot for each")).collect();
    for reader in &mut readers {
        reader.sleep(false).map(Asleep::until_quiescent).expect("nothing has changed");
    }
    for round in 1..=handovers {
        let done = cell.handover(Box::new(move |_| Some(round)), || {}, Duration::from_secs(5));
        assert!(matches!(done, Ok(Handover::Done { .. })));
    }
    // They wake in an orderly way, and find the last value.
    for reader in &mut readers {
        let _ = reader.quiescent();
        assert_eq!(*reader.read(), handovers);
    }
}
