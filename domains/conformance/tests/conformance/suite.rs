//! The suite catches what it is there to catch: a disk that is right passes, and the same disk with
//! one thing wrong does not.

use domain_api::{
    Batch, BlockDomain, Capabilities, Completions, DeviceInfo, DomainError, Host, Op, Params,
    QueueContext, QueueIndex, Region, Request, Status, Swap,
};
use domain_conformance::{Options, check};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What is wrong, as a number, because it must be a constant parameter.
mod wrong {
    pub const NOTHING: u8 = 0;
    pub const LOSES_A_REQUEST: u8 = 1;
    pub const WRITES_ONE_BYTE_LESS: u8 = 2;
    pub const COMPLETES_LATE_UNANNOUNCED: u8 = 3;
    pub const ANSWERS_UNKNOWN_REQUESTS_WITH_OK: u8 = 4;
    pub const TAKES_NOTHING: u8 = 5;
    pub const KEEPS_DATA_IN_ITS_HEAP: u8 = 6;
    pub const TOUCHES_STORAGE_IN_PREPARE: u8 = 7;
    pub const CHANGES_ITS_MIND: u8 = 8;
    pub const ZEROES_ONE_BYTE_MORE: u8 = 9;
    pub const IGNORES_BAD_PARAMETERS: u8 = 10;
    pub const LEAVES_A_THREAD: u8 = 11;
    pub const FORGETS_ON_RESUME: u8 = 12;
    pub const LIES_ABOUT_SWAP: u8 = 13;
    pub const FAILS_LATER_QUEUES: u8 = 14;
    pub const PANICS: u8 = 15;
    pub const IGNORES_PIECES: u8 = 16;
    pub const SETS_NO_SCHEMA: u8 = 17;
    pub const GROWS_FOR_ITSELF: u8 = 18;
    pub const PANICS_WHEN_RESIZED: u8 = 19;
    pub const SAYS_THAT_IT_GREW: u8 = 20;
}

/// An asynchronous disk in memory: requests end in `reap`, after a timer, and it takes four at a
/// time. With one thing `WRONG`.
struct Disk<const WRONG: u8> {
    host: Host,
    size: u64,
    region: OnceLock<Region>,
    /// Instead of the region's, for a domain that keeps its data to itself.
    key: String,
    count: AtomicU64,
    /// What it was resized to, kept where no successor finds it.
    grown: AtomicU64,
}

struct Queue {
    index: QueueIndex,
    held: Vec<Request>,
}

impl<const WRONG: u8> BlockDomain for Disk<WRONG> {
    const NAME: &'static str = "test-disk";
    const VERSION: &'static str = "1";
    const SCHEMA_NAME: &'static str = "test-disk";
    const SCHEMA: u32 = 3;
    const ACCEPTED_SCHEMAS: &'static [u32] = &[2, 3];
    const PARAMS: &'static [&'static str] = &["size"];
    const INHERITED: &'static [&'static str] = &["size"];
    type Queue = Queue;

    fn prepare(host: Host, params: &Params) -> Result<Self, DomainError> {
        let mut size = params.size("size", 1 << 20).or_else(|error| {
            if WRONG == wrong::IGNORES_BAD_PARAMETERS { Ok(1 << 20) } else { Err(error) }
        })?;
        if size == 0 || !size.is_multiple_of(512) {
            if WRONG != wrong::IGNORES_BAD_PARAMETERS {
                return Err(DomainError::new("`size` must be a positive multiple of 512"));
            }
            size = 1 << 20;
        }
        if WRONG == wrong::TOUCHES_STORAGE_IN_PREPARE {
            // And swallows the error.
            let _ = host.storage().region("disk", size);
        }
        static INSTANCES: AtomicU64 = AtomicU64::new(0);
        let key = if WRONG == wrong::KEEPS_DATA_IN_ITS_HEAP {
            format!("disk-{}", INSTANCES.fetch_add(1, Ordering::Relaxed))
        } else {
            "disk".to_owned()
        };
        if WRONG == wrong::LEAVES_A_THREAD {
            host.spawn("left", || std::thread::sleep(Duration::from_secs(20)))?;
        }
        let (count, grown) = (AtomicU64::new(0), AtomicU64::new(0));
        Ok(Self { host, size, region: OnceLock::new(), key, count, grown })
    }

    fn info(&self) -> DeviceInfo {
        let asked = self.count.fetch_add(1, Ordering::Relaxed);
        DeviceInfo {
            capacity: self.size.max(self.grown.load(Ordering::Relaxed)),
            block_size: 512,
            physical_block_size: if WRONG == wrong::CHANGES_ITS_MIND && asked > 0 {
                4096
            } else {
                512
            },
            optimal_io_size: 0,
            discard_granularity: 0,
            capabilities: Capabilities::FLUSH.with(Capabilities::WRITE_ZEROES),
            swap: if WRONG == wrong::LIES_ABOUT_SWAP { Swap::SameBacking } else { Swap::No },
            backing_kind: "test".to_owned(),
            backing_id: (
                0,
                if WRONG == wrong::LIES_ABOUT_SWAP {
                    self.host.clock().as_nanos() as u64
                } else {
                    0
                },
            ),
            backing_cache: 0,
            serial: String::new(),
        }
    }

    fn activate(&self) -> Result<(), DomainError> {
        let storage = self.host.storage();
        let _ = self.region.set(storage.region(&self.key, self.size)?);
        if WRONG == wrong::SETS_NO_SCHEMA { Ok(()) } else { storage.set_schema(Self::SCHEMA) }
    }

    fn quiesce(&self) -> Result<(), DomainError> {
        Ok(())
    }

    fn resize(&self, capacity: u64) -> Result<(), DomainError> {
        match WRONG {
            wrong::GROWS_FOR_ITSELF => {
                self.host.storage().grow_region(&self.key, self.region(), capacity)?;
                self.grown.store(capacity, Ordering::Relaxed);
                Ok(())
            }
            wrong::PANICS_WHEN_RESIZED => panic!("no larger"),
            wrong::SAYS_THAT_IT_GREW => Ok(()),
            _ => Err(DomainError::new("it stays as large as it is")),
        }
    }

    fn resume(&self) -> Result<(), DomainError> {
        if WRONG == wrong::FORGETS_ON_RESUME {
            self.region().zero(0, self.size);
        }
        Ok(())
    }

    fn attach_queue(&self, context: QueueContext) -> Result<Queue, DomainError> {
        if WRONG == wrong::FAILS_LATER_QUEUES && context.queue.0 > 0 {
            return Err(DomainError::new("one queue is enough"));
        }
        Ok(Queue { index: context.queue, held: Vec::new() })
    }

    fn submit(&self, queue: &mut Queue, batch: &mut Batch<'_>, _: &mut Completions<'_>) {
        if WRONG == wrong::TAKES_NOTHING {
            return;
        }
        while queue.held.len() < 4
            && let Some(request) = batch.next()
        {
            let number = self.count.fetch_add(1, Ordering::Relaxed);
            assert!(WRONG != wrong::PANICS || number < 20, "no more than 20");
            if WRONG == wrong::LOSES_A_REQUEST && number == 100 {
                continue;
            }
            queue.held.push(request);
        }
        let (host, index) = (self.host, queue.index);
        if WRONG != wrong::COMPLETES_LATE_UNANNOUNCED && !queue.held.is_empty() {
            host.after(Duration::from_micros(20), move || host.notify(index)).unwrap();
        }
    }

    fn reap(&self, queue: &mut Queue, completions: &mut Completions<'_>) {
        if WRONG == wrong::COMPLETES_LATE_UNANNOUNCED
            && !self.count.fetch_add(1, Ordering::Relaxed).is_multiple_of(4)
        {
            return;
        }
        // The last first: a queue promises no order.
        while let Some(request) = queue.held.pop() {
            let status = self.serve(&request);
            completions.complete(request, status);
        }
    }
}

impl<const WRONG: u8> Disk<WRONG> {
    fn region(&self) -> &Region {
        self.region.get().expect("activated")
    }

    fn serve(&self, request: &Request) -> Status {
        let (region, offset, buffer) = (self.region(), request.offset(), request.buffer());
        match request.op() {
            Some(Op::Read) => region.read(offset, &buffer),
            Some(Op::Write) if WRONG == wrong::WRITES_ONE_BYTE_LESS => {
                let mut bytes = vec![0; buffer.len() - 1];
                buffer.copy_to_slice(0, &mut bytes);
                region.copy_from_slice(offset, &bytes);
            }
            Some(Op::Write) if WRONG == wrong::IGNORES_PIECES => {
                // Right for any data of one piece, and a wrong order for 511, 1 and 513 bytes.
                let mut bytes = vec![0; buffer.len()];
                buffer.copy_to_slice(511.min(bytes.len()), &mut bytes);
                buffer.copy_to_slice(0, &mut bytes[..511]);
                region.copy_from_slice(offset, &bytes);
            }
            Some(Op::Write) => region.write(offset, &buffer),
            Some(Op::WriteZeroes { .. }) => {
                let more = u64::from(
                    WRONG == wrong::ZEROES_ONE_BYTE_MORE && offset + request.len() < self.size,
                );
                region.zero(offset, request.len() + more);
            }
            Some(Op::Flush) => {}
            Some(Op::Discard) => return Status::Unsupported,
            None if WRONG == wrong::ANSWERS_UNKNOWN_REQUESTS_WITH_OK => {}
            None => return Status::Unsupported,
        }
        Status::Ok
    }
}

fn options() -> Options {
    let params = Params::from_pairs(["size=256K"]).expect("written here");
    Options { deadline: Duration::from_millis(300), ..Options::new(params) }
}

#[track_caller]
fn caught<const WRONG: u8>(by: &str, saying: &str) {
    let violation =
        check::<Disk<WRONG>>(&options()).expect_err("the suite let it pass").to_string();
    assert!(violation.starts_with(by) && violation.contains(saying), "{violation}");
}

#[test]
fn a_disk_that_is_right_passes() {
    let report = check::<Disk<{ wrong::NOTHING }>>(&options()).unwrap();
    assert!(report.checks.len() >= 16);
}

#[test]
fn requests_that_are_not_answered_are_caught() {
    caught::<{ wrong::LOSES_A_REQUEST }>("", "not answered within");
    caught::<{ wrong::TAKES_NOTHING }>("unknown requests", "took none of");
    caught::<{ wrong::COMPLETES_LATE_UNANNOUNCED }>("", "without a notification");
    caught::<{ wrong::PANICS }>("", "panicked: no more than 20");
}

#[test]
fn wrong_data_is_caught() {
    caught::<{ wrong::WRITES_ONE_BYTE_LESS }>("segments", "the disk reads");
    caught::<{ wrong::IGNORES_PIECES }>("segments", "the disk reads");
    caught::<{ wrong::ZEROES_ONE_BYTE_MORE }>("flush, discard, write zeroes", "the disk reads");
    caught::<{ wrong::ANSWERS_UNKNOWN_REQUESTS_WITH_OK }>("unknown requests", "not Unsupported");
}

#[test]
fn wrong_lifecycles_are_caught() {
    caught::<{ wrong::KEEPS_DATA_IN_ITS_HEAP }>("handover", "the disk reads");
    caught::<{ wrong::FORGETS_ON_RESUME }>("upgrade given up", "the disk reads");
    caught::<{ wrong::TOUCHES_STORAGE_IN_PREPARE }>("preparing", "open region `disk`");
    caught::<{ wrong::SETS_NO_SCHEMA }>("announcement", "schema number at 0");
    caught::<{ wrong::FAILS_LATER_QUEUES }>("random requests", "attaching queue 1 failed");
}

#[test]
fn a_new_size_that_others_do_not_know_is_caught() {
    caught::<{ wrong::PANICS_WHEN_RESIZED }>("resizing", "panics when it is resized");
    caught::<{ wrong::SAYS_THAT_IT_GREW }>("resizing", "though it said that it is not");
    let options = Options { resizes: true, ..options() };
    let said = |violation: Result<_, domain_conformance::Violation>| {
        violation.expect_err("the suite let it pass").to_string()
    };
    let violation = said(check::<Disk<{ wrong::SAYS_THAT_IT_GREW }>>(&options));
    assert!(violation.contains("the instance that was resized announces"), "{violation}");
    let violation = said(check::<Disk<{ wrong::GROWS_FOR_ITSELF }>>(&options));
    assert!(violation.contains("prepared before announces"), "{violation}");
    let violation = said(check::<Disk<{ wrong::NOTHING }>>(&options));
    assert!(violation.contains("resize failed: it stays"), "{violation}");
}

#[test]
fn wrong_announcements_and_parameters_are_caught() {
    caught::<{ wrong::CHANGES_ITS_MIND }>("announcement", "changes");
    caught::<{ wrong::LIES_ABOUT_SWAP }>("", "");
    caught::<{ wrong::IGNORES_BAD_PARAMETERS }>("parameters", "it accepts the parameter `size=`");
}

#[test]
fn a_thread_that_stays_is_caught() {
    caught::<{ wrong::LEAVES_A_THREAD }>("preparing", "does not go away");
}
