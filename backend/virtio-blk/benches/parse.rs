//! What parsing costs: `cargo bench -p virtio-blk`.
//!
//! Not a test of a limit, which would fail on a busy machine; it prints.

#[path = "../tests/common/mod.rs"]
mod common;

use common::*;
use std::hint::black_box;
use std::time::Instant;
use virtio_blk::{Translator, parse, usual};

fn cost_ns(name: &str, table: &[Desc], indirect: bool) {
    let guest = Guest::new();
    guest.header(0, 8);
    if indirect {
        write_table(&guest.memory, INDIRECT_TABLE, table);
        write_table(
            &guest.memory,
            TABLE,
            &[(INDIRECT_TABLE, 16 * table.len() as u32, INDIRECT, 0)],
        );
    } else {
        write_table(&guest.memory, TABLE, table);
    }
    let chain = chain(&guest.memory, 0);
    let mut segments = Vec::with_capacity(128);
    let time = |work: &mut dyn FnMut()| {
        // The best of many short runs: what it costs where nothing else gets the CPU.
        const ROUNDS: u32 = 1000;
        let run = |_| {
            let start = Instant::now();
            (0..ROUNDS).for_each(|_| work());
            start.elapsed().as_secs_f64() * 1e9 / f64::from(ROUNDS)
        };
        (0..500).map(run).fold(f64::INFINITY, f64::min)
    };
    // SAFETY: `guest` outlives everything that is parsed.
    let mut translator = unsafe { Translator::new(&guest.memory) };
    let parse_ns = time(&mut || {
        black_box(parse(
            black_box(QUEUE),
            black_box(0),
            &mut translator,
            &guest.limits,
            &mut segments,
        ));
    });
    translator.begin(QUEUE);
    let glance_ns = usual(0, &translator, &guest.limits).map(|_| {
        time(&mut || {
            black_box(usual(black_box(0), &translator, &guest.limits));
        })
    });
    let walk_ns = time(&mut || {
        for descriptor in black_box(chain.clone()) {
            black_box(descriptor);
        }
    });
    let glance = glance_ns.map_or(String::new(), |ns| format!("at a glance {ns:.1} ns, else "));
    println!(
        "{name}: {glance}{parse_ns:.1} ns; virtio-queue's walk without any parsing: {walk_ns:.1} ns"
    );
}

fn main() {
    let one = [(HEADER, 16, NEXT, 1), (DATA, 4096, WRITE | NEXT, 2), (STATUS, 1, WRITE, 0)];
    cost_ns("4 KiB read, three descriptors", &one, false);
    cost_ns("4 KiB read, indirect", &one, true);
    let mut many: Vec<Desc> = vec![(HEADER, 16, NEXT, 1)];
    many.extend((0..32).map(|i| (DATA, 4096, WRITE | NEXT, i + 2)));
    many.push((STATUS, 1, WRITE, 0));
    cost_ns("128 KiB read in 32 pieces, indirect", &many, true);
}
