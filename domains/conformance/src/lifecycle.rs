//! Checks of the calls around the requests: what a domain says about itself, and how the disk
//! passes from instance to instance.

use super::bench::Bench;
use super::data::{Shadow, Subject, info, prepare};
use super::domain::Domain;
use super::lane::Job;
use super::test_host::TestStorage;
use super::{Options, Random, Violation, ensure};
use domain_abi::descriptor::{Description, Descriptor};
use domain_api::{Capabilities, DeviceInfo, Params, Swap};

/// The constants make a descriptor that a host reads back.
pub(super) fn constants(domain: Domain, _: &Options) -> Result<(), Violation> {
    // SAFETY: `Descriptor` is `repr(C)` of integers and byte arrays whose sizes are multiples of 4:
    // no padding.
    let bytes = unsafe {
        std::slice::from_raw_parts(
            std::ptr::from_ref(domain.descriptor).cast::<u8>(),
            size_of::<Descriptor>(),
        )
    };
    let read = Description::parse(bytes).map_err(|error| Violation::new(error.to_string()))?;
    ensure(read.name == domain.name && read.version == domain.version, || {
        "its name or version is cut".to_owned()
    })?;
    ensure(read.schema != 0 && read.accepted_schemas.contains(&read.schema), || {
        format!("its schema {} is 0, or not one of those that it accepts", read.schema)
    })?;
    ensure(!read.schema_name.is_empty(), || "its storage layout has no name".to_owned())?;
    match read.inherited.iter().find(|key| !read.params.contains(key)) {
        None => Ok(()),
        Some(key) => Err(Violation::new(format!("it inherits `{key}`, which it does not take"))),
    }
}

pub(super) fn with(params: &Params, key: &str, value: &str) -> Params {
    let mut params = params.clone();
    params.set(key, value);
    params
}

fn refused(domain: Domain, params: &Params, key: &str, value: &str) -> Result<(), Violation> {
    let storage = TestStorage::new();
    match Bench::of(domain.module(), &storage, &with(params, key, value)) {
        Ok(_) => Err(Violation::new(format!("it accepts the parameter `{key}={value}`"))),
        Err(domain_host::CallError::Panicked(text)) => {
            Err(Violation::new(format!("the parameter `{key}={value}` makes it panic: {text}")))
        }
        Err(domain_host::CallError::Failed(text)) => ensure(text.contains(key), || {
            format!("it refuses `{key}={value}` with a sentence that does not name `{key}`: {text}")
        }),
    }
}

/// What it does not take is refused, by name; so are values that make no sense.
pub(super) fn parameters(domain: Domain, options: &Options) -> Result<(), Violation> {
    refused(domain, &options.params, "no-such-parameter", "1")?;
    let known: [(&str, &[&str]); 4] = [
        ("size", &["", "0", "many", "-1", "513", "64MB", "99999999999999999999"]),
        ("serial", &["a-serial-that-has-21-b", "two\nlines"]),
        ("direct", &["", "yes", "TRUE"]),
        ("readonly", &["", "no", "1"]),
    ];
    for (key, values) in known {
        if domain.params.contains(&key) {
            for value in values {
                refused(domain, &options.params, key, value)?;
            }
        }
    }
    options.refused.iter().try_for_each(|(key, value)| refused(domain, &options.params, key, value))
}

/// Preparing, and dropping what was prepared, leaves the storage alone.
pub(super) fn preparing(domain: Domain, options: &Options) -> Result<(), Violation> {
    let storage = TestStorage::new();
    let bench = prepare(domain, &storage, options)?;
    info(&bench)?;
    bench.retire()?;
    ensure(storage.schema() == 0, || "preparing set the storage's schema".to_owned())
}

/// The announcement makes sense, and is the same whenever and from wherever it is asked for.
pub(super) fn announcement(domain: Domain, options: &Options) -> Result<(), Violation> {
    let storage = TestStorage::new();
    let bench = prepare(domain, &storage, options)?;
    let first = info(&bench)?;
    sane(&first)?;
    bench.activate().map_err(|error| Violation::new(format!("activate failed: {error}")))?;
    let elsewhere = std::thread::scope(|scope| {
        scope.spawn(|| info(&bench)).join().unwrap_or_else(|_| Err(Violation::new("info panicked")))
    })?;
    ensure(info(&bench)? == first && elsewhere == first, || "its announcement changes".to_owned())?;
    ensure(storage.schema() == domain.schema, || {
        format!(
            "activating leaves the schema number at {}, not {}",
            storage.schema(),
            domain.schema
        )
    })?;
    if domain.params.contains(&"serial") {
        let serial = "S/N 0123456789abcdef";
        let params = with(&options.params, "serial", serial);
        let named = prepare(domain, &TestStorage::new(), &Options { params, ..options.clone() })?;
        let said = info(&named)?.serial;
        ensure(said == serial, || format!("its serial number is `{said}`, not `{serial}`"))?;
        named.retire()?;
    }
    bench.retire()
}

fn sane(info: &DeviceInfo) -> Result<(), Violation> {
    let known = [
        Capabilities::READ_ONLY,
        Capabilities::FLUSH,
        Capabilities::DISCARD,
        Capabilities::WRITE_ZEROES,
        Capabilities::WRITE_CACHE,
    ];
    let all = known.into_iter().fold(Capabilities::default(), Capabilities::with);
    ensure(all.contains(info.capabilities), || {
        format!("it announces unknown capabilities: {:#x}", info.capabilities.0 & !all.0)
    })?;
    ensure(info.physical_block_size >= info.block_size, || {
        "its physical blocks are smaller than its logical ones".to_owned()
    })?;
    for (name, size) in [
        ("optimal I/O size", info.optimal_io_size),
        ("discard granularity", info.discard_granularity),
    ] {
        ensure(size.is_multiple_of(info.block_size), || {
            format!(
                "its {name} of {size} bytes is no multiple of its block size of {}",
                info.block_size
            )
        })?;
    }
    ensure(!info.backing_kind.is_empty(), || "it does not say what holds the data".to_owned())
}

/// A queue can be let go of and served by another thread; and each queue by itself.
pub(super) fn moving_queue(domain: Domain, options: &Options) -> Result<(), Violation> {
    let subject = Subject::activated(domain, options)?;
    let mut shadow = subject.load(options, &mut subject.bench.lane(0)?)?;
    let mut random = Random::new(options.seed);
    let block = u64::from(subject.info.block_size);
    for round in 0..6 {
        let data = random.bytes(block as usize);
        let (subject, shadow) = (&subject, &mut shadow);
        std::thread::scope(|scope| {
            let worker = scope.spawn(move || {
                let mut lane = subject.bench.lane(u32::from(round >= 3))?;
                if subject.writable() {
                    shadow.write(&mut lane, round * block, data)?;
                }
                shadow.verify(&mut lane)
            });
            worker.join().unwrap_or_else(|_| Err(Violation::new("the suite panicked on a worker")))
        })?;
    }
    subject.bench.retire()
}

/// Calls that a domain may ignore do not disturb it.
pub(super) fn optional_calls(domain: Domain, options: &Options) -> Result<(), Violation> {
    let subject = Subject::activated(domain, options)?;
    let mut lane = subject.bench.lane(0)?;
    let mut shadow = subject.load(options, &mut lane)?;
    let mut random = Random::new(options.seed);
    let (instance, block) = (&subject.bench.instance, u64::from(subject.info.block_size));
    let memory = vec![0u8; 1 << 16];
    let said = |what: &str, result: Result<(), _>| {
        result.map_err(|e| Violation::new(format!("{what} failed: {e}")))
    };
    said(
        "memory_changed",
        instance.memory_changed(memory.as_ptr().expose_provenance(), memory.len(), true),
    )?;
    said("cancel", instance.cancel())?;
    for on in [false, true, false] {
        said("set_write_cache", instance.set_write_cache(on))?;
        if subject.writable() {
            for offset in [0, 9 * block] {
                shadow.write(&mut lane, offset, random.bytes(3 * block as usize))?;
            }
        }
        if subject.can(Capabilities::FLUSH) {
            lane.one(Job::flush())?.ok()?;
        }
    }
    said(
        "memory_changed",
        instance.memory_changed(memory.as_ptr().expose_provenance(), memory.len(), false),
    )?;
    shadow.verify(&mut lane)?;
    drop(lane);
    subject.bench.retire()
}

pub(super) fn phase(
    what: &str,
    result: Result<(), domain_host::CallError>,
) -> Result<(), Violation> {
    result.map_err(|error| Violation::new(format!("{what} failed: {error}")))
}

/// Writes something new and reads everything, on every queue.
pub(super) fn exercise(
    bench: &Bench,
    info: &DeviceInfo,
    shadow: &mut Shadow,
    random: &mut Random,
    queues: u32,
) -> Result<(), Violation> {
    for queue in 0..queues {
        let mut lane = bench.lane(queue)?;
        if !info.capabilities.contains(Capabilities::READ_ONLY) {
            let block = u64::from(info.block_size);
            let offset = random.below(info.capacity / block - 8) * block;
            shadow.write(&mut lane, offset, random.bytes(8 * block as usize))?;
        }
        shadow.verify(&mut lane)?;
    }
    Ok(())
}

/// The disk passes to a successor that was prepared while its predecessor served, and back again.
pub(super) fn handover(domain: Domain, options: &Options) -> Result<(), Violation> {
    let subject = Subject::activated(domain, options)?;
    let mut shadow = subject.load(options, &mut subject.bench.lane(0)?)?;
    let mut random = Random::new(options.seed);
    let (info_before, queues) = (&subject.info, options.queues);
    exercise(&subject.bench, info_before, &mut shadow, &mut random, queues)?;
    let next = prepare(domain, &subject.storage, options)?;
    ensure(info(&next)? == *info_before, || {
        "a successor with the same parameters announces another device".to_owned()
    })?;
    exercise(&subject.bench, info_before, &mut shadow, &mut random, queues)
        .map_err(|v| v.during("while a successor is prepared"))?;
    phase("quiesce", subject.bench.instance.quiesce())?;
    phase("activate", next.activate())?;
    exercise(&next, info_before, &mut shadow, &mut random, queues)
        .map_err(|v| v.during("after a handover"))?;
    phase("quiesce", next.instance.quiesce())?;
    phase("activate", subject.bench.activate()).map_err(|v| v.during("rollback"))?;
    exercise(&subject.bench, info_before, &mut shadow, &mut random, queues)
        .map_err(|v| v.during("after a rollback"))?;
    next.retire()?;
    exercise(&subject.bench, info_before, &mut shadow, &mut random, queues)
        .map_err(|v| v.during("after the other instance ended"))?;
    subject.bench.retire()
}

/// An instance that was quiesced and resumed goes on, whether or not a successor has tried to take
/// up the storage.
pub(super) fn given_up(domain: Domain, options: &Options) -> Result<(), Violation> {
    let subject = Subject::activated(domain, options)?;
    let mut shadow = subject.load(options, &mut subject.bench.lane(0)?)?;
    let mut random = Random::new(options.seed);
    for successor in [false, true] {
        exercise(&subject.bench, &subject.info, &mut shadow, &mut random, options.queues)?;
        phase("quiesce", subject.bench.instance.quiesce())?;
        if successor {
            let next = prepare(domain, &subject.storage, options)?;
            phase("activate", next.activate())?;
            next.retire()?;
            subject.bench.host.own_storage();
        }
        phase("resume", subject.bench.instance.resume())?;
        exercise(&subject.bench, &subject.info, &mut shadow, &mut random, options.queues)
            .map_err(|v| v.during("after resuming"))?;
    }
    subject.bench.retire()
}

/// Two instances on the same backing serve at the same time, and each sees what the other has
/// completed.
pub(super) fn side_by_side(domain: Domain, options: &Options) -> Result<(), Violation> {
    let subject = Subject::activated(domain, options)?;
    if subject.info.swap != Swap::SameBacking {
        return subject.bench.retire();
    }
    let next = prepare(domain, &subject.storage, options)?;
    let (mine, theirs) = (&subject.info, info(&next)?);
    ensure(
        (mine.backing_id, mine.backing_cache) == (theirs.backing_id, theirs.backing_cache),
        || "two instances with the same parameters have different backings".to_owned(),
    )?;
    let mut random = Random::new(options.seed);
    let block = u64::from(mine.block_size);
    let mut old = subject.bench.lane(0)?;
    let mut shadow = subject.load(options, &mut old)?;
    phase("activate", next.activate())?;
    let mut new = next.lane(0)?;
    for round in 0..20 {
        let (one, two) = if round % 2 == 0 { (&mut old, &mut new) } else { (&mut new, &mut old) };
        if subject.writable() {
            let offset = random.below(mine.capacity / block - 4) * block;
            shadow.write(one, offset, random.bytes(4 * block as usize))?;
        }
        if subject.can(Capabilities::FLUSH) {
            two.one(Job::flush())?.ok()?;
        }
        shadow.verify(two)?;
    }
    drop(old);
    // Swapped: the predecessor ends without having been quiesced.
    subject.bench.retire()?;
    shadow.verify(&mut new)?;
    drop(new);
    next.retire()
}

/// An instance that is gone without a quiesce takes nothing with it.
pub(super) fn death(domain: Domain, options: &Options) -> Result<(), Violation> {
    let Subject { storage, bench, info } = Subject::activated(domain, options)?;
    let mut random = Random::new(options.seed);
    let mut shadow = Shadow::load(&mut bench.lane(0)?, &info, options, 0, info.capacity)?;
    exercise(&bench, &info, &mut shadow, &mut random, options.queues)?;
    bench.retire()?;
    let next = prepare(domain, &storage, options)?;
    phase("activate", next.activate())?;
    exercise(&next, &info, &mut shadow, &mut random, options.queues)?;
    next.retire()
}

/// A panic ends the instance, not the process, and a successor goes on with the disk.
pub(super) fn panic(domain: Domain, options: &Options) -> Result<(), Violation> {
    let Some(params) = options.panics.clone() else { return Ok(()) };
    let subject = Subject::activated(domain, &Options { params, ..options.clone() })?;
    let mut lane = subject.bench.lane(0)?;
    let block = u64::from(subject.info.block_size);
    let panicked = (0..10_000).find_map(|_| lane.one(Job::read(0, block)).err());
    ensure(panicked.is_some() && subject.bench.instance.is_dead(), || {
        "no request made it panic, though that was promised".to_owned()
    })?;
    ensure(subject.bench.instance.quiesce().is_err(), || {
        "it can be called after a panic".to_owned()
    })?;
    drop(lane);
    let next = prepare(domain, &subject.storage, options)?;
    phase("activate", next.activate())?;
    subject.bench.retire()?;
    let mut shadow =
        Shadow::load(&mut next.lane(0)?, &subject.info, options, 0, subject.info.capacity)?;
    exercise(&next, &subject.info, &mut shadow, &mut Random::new(options.seed), options.queues)?;
    next.retire()
}
