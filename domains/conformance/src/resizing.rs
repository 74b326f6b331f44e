//! Checks of a disk that becomes larger while it is used, and of those that come after.

use super::bench::Bench;
use super::data::{Shadow, Subject, info, prepare};
use super::domain::Domain;
use super::lifecycle::{exercise, phase, with};
use super::{Options, Random, Violation, ensure};
use domain_api::DeviceInfo;
use domain_host::CallError;

/// Times that the disk grows.
const STEPS: u64 = 8;
/// Blocks that it grows by each time; odd, so that it ends anywhere in a page.
const BLOCKS: u64 = 33;

/// The disk grows under requests, keeps what it has, and is as large for every other instance.
pub(super) fn resizing(domain: Domain, options: &Options) -> Result<(), Violation> {
    let subject = Subject::activated(domain, options)?;
    // As a standby was: before, and maybe with a parameter that says so.
    let other = prepare(domain, &subject.storage, options)?;
    let (bench, before) = (&subject.bench, &subject.info);
    let mut random = Random::new(options.seed);
    let mut shadow = subject.load(options, &mut bench.lane(0)?)?;
    exercise(bench, before, &mut shadow, &mut random, options.queues)?;
    if !options.resizes {
        refuses(bench, before)?;
        exercise(bench, before, &mut shadow, &mut random, options.queues)
            .map_err(|violation| violation.during("after it has refused"))?;
        other.retire()?;
        return subject.bench.retire();
    }
    let step = BLOCKS * u64::from(before.block_size);
    let after = DeviceInfo { capacity: before.capacity + STEPS * step, ..before.clone() };
    let grown = std::thread::scope(|scope| {
        let grows = scope.spawn(|| {
            (1..=STEPS).try_for_each(|n| bench.instance.resize(before.capacity + n * step))
        });
        while !grows.is_finished() {
            exercise(bench, before, &mut shadow, &mut random, 1)?;
        }
        Ok(grows.join().unwrap_or_else(|_| Err(CallError::Failed("the suite panicked".into()))))
    })
    .map_err(|violation: Violation| violation.during("while it grows"))?;
    phase("resize", grown)?;
    announces(bench, &after, "the instance that was resized")?;
    shadow.verify(&mut bench.lane(0)?)?;
    let mut whole = Shadow::load(&mut bench.lane(0)?, &after, options, 0, after.capacity)?;
    reaches_the_end(bench, &after, &mut whole, &mut random)?;
    exercise(bench, &after, &mut whole, &mut random, options.queues)?;

    announces(&other, &after, "an instance that was prepared before")?;
    let mut params = options.params.clone();
    if domain.params.contains(&"size") && params.get("size").is_some() {
        params = with(&params, "size", &after.capacity.to_string());
    }
    let told = Options { params, ..options.clone() };
    let next = prepare(domain, &subject.storage, &told)?;
    announces(&next, &after, "a successor")?;
    let mut from = bench;
    for (to, what) in [(&other, "rollback"), (&next, "upgrade"), (bench, "second rollback")] {
        phase("quiesce", from.instance.quiesce())?;
        phase("activate", to.activate()).map_err(|violation| violation.during(what))?;
        let used = reaches_the_end(to, &after, &mut whole, &mut random)
            .and_then(|()| exercise(to, &after, &mut whole, &mut random, options.queues));
        used.map_err(|violation| violation.during(what))?;
        from = to;
    }
    other.retire()?;
    next.retire()?;
    subject.bench.retire()?;
    // Gone without a quiesce.
    let last = prepare(domain, &subject.storage, &told)?;
    phase("activate", last.activate())?;
    announces(&last, &after, "a successor of one that died")?;
    exercise(&last, &after, &mut whole, &mut random, options.queues)?;
    last.retire()
}

fn refuses(bench: &Bench, before: &DeviceInfo) -> Result<(), Violation> {
    match bench.instance.resize(2 * before.capacity) {
        Err(CallError::Failed(text)) => {
            ensure(!text.is_empty(), || "it refuses to be resized without a word".to_owned())?;
        }
        Err(CallError::Panicked(text)) => {
            return Err(Violation::new(format!("it panics when it is resized: {text}")));
        }
        Ok(()) => return Err(Violation::new("it is resized, though it said that it is not")),
    }
    announces(bench, before, "an instance that refuses to be resized")
}

fn announces(bench: &Bench, expected: &DeviceInfo, who: &str) -> Result<(), Violation> {
    let announced = info(bench)?;
    ensure(announced == *expected, || {
        format!(
            "{who} announces {} bytes, the disk has {}; or it differs otherwise",
            announced.capacity, expected.capacity
        )
    })
}

/// Writes and reads the last blocks, and those at which the disk ended before.
fn reaches_the_end(
    bench: &Bench,
    info: &DeviceInfo,
    shadow: &mut Shadow,
    random: &mut Random,
) -> Result<(), Violation> {
    let (block, mut lane) = (u64::from(info.block_size), bench.lane(0)?);
    if !info.capabilities.contains(domain_api::Capabilities::READ_ONLY) {
        let before = info.capacity - STEPS * BLOCKS * block;
        for offset in [before - block, info.capacity - 2 * block] {
            shadow.write(&mut lane, offset, random.bytes(2 * block as usize))?;
        }
    }
    shadow.verify(&mut lane)
}
