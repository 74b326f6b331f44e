//! The domain that does what it is told.
//!
//! Parameters besides `size`, `serial`, `cache`, `backing`, `swap`, `caps`, `block` and `physical`,
//! which it announces:
//!
//! * `stage`, `label`: where it writes down what it did, and under what name;
//! * `break=STEP[,STEP...]`: panics there, each time (`cacheN`: the N-th time that it is told of
//!   the write cache); `fail=STEP,...`: says no there;
//! * `die_at=N`: panics at the N-th request of the instance;
//! * `hold=true`: requests stay in flight until the stage lets them go;
//! * `take=N`: takes at most N requests of a batch;
//! * `bad_at=N`: ends the N-th request of the instance with an I/O error;
//! * `backwards=true`: ends the requests of a batch from the last to the first;
//! * `cross=true`: keeps the first request of each queue, and ends it in the other queue's
//!   completions, at its next reap;
//! * `cross=submit`: the same, but at its next submit;
//! * `wait=prepare`, `wait=activate`, `wait=drop`: does that only when the stage lets it;
//!   `wait=cache`: is told of the write cache until the stage lets go of what is held;
//! * `hang_at=N`: does not come back from the N-th request of the instance until the stage lets go
//!   of what is held;
//! * `make=LEN`: puts a region of that length, bytes and a file into the storage when it is
//!   activated; what it finds there first, it writes down;
//! * `resize=early`: leaves the new capacity in storage before it comes to the step `resize`;
//!   `resize=never`: does not look there;
//! * `claim=true`: there is something to claim, which the stage may have `taken`;
//! * `thread=true`: starts a thread that ends when the stage says so.

use domain_api::{
    Batch, BlockDomain, Capabilities, Claim, Completions, DeviceInfo, DomainError, Host, Params,
    QueueContext, Request, Status, Swap,
};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does not come back before `flag` is set; or, for a test that has failed and cannot set it any
/// more, much too late.
fn wait_for(flag: &AtomicBool) {
    let started = std::time::Instant::now();
    while !flag.load(Ordering::Acquire) && started.elapsed() < std::time::Duration::from_secs(30) {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// Where the puppets of one test act.
#[derive(Debug, Default)]
pub struct Stage {
    name: String,
    log: Mutex<Vec<String>>,
    /// What is held may end.
    pub release: AtomicBool,
    /// `wait=...` may go on.
    pub go: AtomicBool,
    /// Another program has what `claim=true` claims.
    pub taken: AtomicBool,
    /// `thread=true` may end.
    pub end: AtomicBool,
    /// What `cross` has kept.
    kept: Mutex<Vec<(u32, Request)>>,
}

static STAGES: Mutex<BTreeMap<String, Arc<Stage>>> = Mutex::new(BTreeMap::new());
static NUMBER: AtomicUsize = AtomicUsize::new(0);

impl Stage {
    /// A stage of its own for one test.
    #[allow(clippy::new_ret_no_self, reason = "puppets find it by its name")]
    pub fn new() -> Arc<Stage> {
        let name = format!("stage-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let stage = Arc::new(Stage { name: name.clone(), ..Stage::default() });
        lock(&STAGES).insert(name, Arc::clone(&stage));
        stage
    }

    /// The parameters of a puppet on this stage.
    pub fn params(&self, label: &str, script: &[&str]) -> Params {
        let mut params = Params::from_pairs(script).expect("pairs");
        params.set("stage", self.name.clone());
        params.set("label", label);
        params
    }

    /// Writes a line down.
    pub fn write(&self, line: String) {
        lock(&self.log).push(line);
    }

    /// All lines.
    #[must_use]
    pub fn log(&self) -> Vec<String> {
        lock(&self.log).clone()
    }

    /// The lines of the puppet `label`, without its name, that begin with `what`.
    #[must_use]
    pub fn lines(&self, label: &str, what: &str) -> Vec<String> {
        let start = format!("{label} {what}");
        self.log()
            .iter()
            .filter_map(|line| line.strip_prefix(&start))
            .map(|rest| rest.trim().to_owned())
            .collect()
    }
}

/// What tells puppets apart before they are loaded.
pub trait Kind: Send + Sync + 'static {
    /// The domain's name.
    const NAME: &'static str;
    /// The name of its schema.
    const LAYOUT: &'static str = "puppet";
    /// The schema that it writes.
    const SCHEMA: u32 = 1;
    /// The schemas that it takes up.
    const ACCEPTED: &'static [u32] = &[1];
}

/// Schema 1, and takes it.
pub struct Plain;
/// Writes schema 2, takes both.
pub struct Wide;
/// Takes schema 9 only.
pub struct Narrow;
/// Another layout.
pub struct Other;

impl Kind for Plain {
    const NAME: &'static str = "plain";
}
impl Kind for Wide {
    const NAME: &'static str = "wide";
    const SCHEMA: u32 = 2;
    const ACCEPTED: &'static [u32] = &[1, 2];
}
impl Kind for Narrow {
    const NAME: &'static str = "narrow";
    const SCHEMA: u32 = 9;
    const ACCEPTED: &'static [u32] = &[9];
}
impl Kind for Other {
    const NAME: &'static str = "other";
    const LAYOUT: &'static str = "something else";
}

/// The domain.
pub struct Puppet<K: Kind> {
    host: Host,
    stage: Arc<Stage>,
    params: Params,
    label: String,
    seen: AtomicU64,
    cached: AtomicU64,
    kind: PhantomData<fn() -> K>,
}

/// A queue, and what it holds back.
pub struct Queue {
    index: u32,
    held: Vec<Request>,
}

impl<K: Kind> Puppet<K> {
    fn is(&self, key: &str, step: &str) -> bool {
        self.params.get(key).is_some_and(|steps| steps.split(',').any(|s| s == step))
    }

    /// What is in storage of a disk that was resized; not what a puppet of old knows.
    fn resized(&self) -> Option<u64> {
        let bytes = self.host.storage().bytes("capacity")?;
        (!self.is("resize", "never"))
            .then(|| u64::from_le_bytes(bytes.try_into().expect("8 bytes")))
    }

    fn number(&self, key: &str) -> Option<u64> {
        self.params.get(key).map(|value| value.parse().expect("a number"))
    }

    /// Writes down that it came here, and breaks or fails if it is to.
    fn step(&self, step: &str) -> Result<(), DomainError> {
        self.stage.write(format!("{} {step}", self.label));
        assert!(!self.is("break", step), "break={step}");
        if self.is("fail", step) { Err(DomainError::new(format!("fail={step}"))) } else { Ok(()) }
    }
}

impl<K: Kind> Puppet<K> {
    /// Ends what was kept of other queues, in the completions of this one.
    fn end_others(&self, queue: u32, completions: &mut Completions<'_>) {
        let mut kept = lock(&self.stage.kept);
        while let Some(at) = kept.iter().position(|(from, _)| *from != queue) {
            completions.complete(kept.swap_remove(at).1, Status::Ok);
        }
    }
}

impl<K: Kind> BlockDomain for Puppet<K> {
    const NAME: &'static str = K::NAME;
    const VERSION: &'static str = "1.0.0";
    const SCHEMA_NAME: &'static str = K::LAYOUT;
    const SCHEMA: u32 = K::SCHEMA;
    const ACCEPTED_SCHEMAS: &'static [u32] = K::ACCEPTED;
    const PARAMS: &'static [&'static str] = &[
        "size",
        "serial",
        "cache",
        "backing",
        "swap",
        "caps",
        "stage",
        "label",
        "break",
        "fail",
        "die_at",
        "hold",
        "take",
        "bad_at",
        "backwards",
        "cross",
        "wait",
        "hang_at",
        "make",
        "thread",
        "block",
        "physical",
        "kind",
        "resize",
        "claim",
    ];
    const INHERITED: &'static [&'static str] = &["size", "serial"];

    type Queue = Queue;

    fn prepare(host: Host, params: &Params) -> Result<Self, DomainError> {
        let stage = params.get("stage").and_then(|name| lock(&STAGES).get(name).cloned());
        let new = Self {
            host,
            stage: stage.ok_or_else(|| DomainError::new("no stage"))?,
            label: params.get("label").unwrap_or("?").to_owned(),
            params: params.clone(),
            seen: AtomicU64::new(0),
            cached: AtomicU64::new(0),
            kind: PhantomData,
        };
        if new.is("wait", "prepare") {
            wait_for(&new.stage.go);
        }
        if new.is("thread", "true") {
            let stage = Arc::clone(&new.stage);
            new.host.spawn("puppet", move || wait_for(&stage.end))?;
        }
        new.step("prepare").map(|()| new)
    }

    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            capacity: self.resized().unwrap_or(self.params.size("size", 1 << 20).expect("a size")),
            block_size: self.number("block").unwrap_or(512) as u32,
            physical_block_size: self.number("physical").unwrap_or(512) as u32,
            optimal_io_size: 0,
            discard_granularity: 512,
            capabilities: Capabilities(self.number("caps").unwrap_or(Capabilities::FLUSH.0)),
            swap: if self.is("swap", "true") { Swap::SameBacking } else { Swap::No },
            backing_kind: self.params.get("kind").unwrap_or("puppet").to_owned(),
            backing_id: (0, self.number("backing").unwrap_or(0)),
            backing_cache: self.number("cache").unwrap_or(0),
            serial: self.params.serial().expect("a serial number"),
        }
    }

    fn activate(&self) -> Result<(), DomainError> {
        if self.is("wait", "activate") {
            self.stage.write(format!("{} waits", self.label));
            wait_for(&self.stage.go);
        }
        // First, as a domain would that changes things and then finds out that it cannot go on.
        let storage = self.host.storage();
        if let Some(len) = self.number("make") {
            let note =
                storage.bytes("note").map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
            let file = storage
                .file("file")
                .expect("a descriptor")
                .map(|file| file.metadata().expect("a file").is_dir());
            let found =
                format!("{} found {} {note:?} {file:?}", self.label, storage.region_len("made"));
            self.stage.write(found);
            storage.region("made", len)?;
            // More than once, as a domain does that writes down how far it has come.
            storage.set_bytes("note", b"half of it")?;
            storage.set_bytes("note", self.label.as_bytes())?;
            let path = if self.label == "a" { "/dev/null" } else { "/" };
            storage
                .set_file("file", &std::fs::File::open(path).expect("a file of every system"))?;
        }
        storage.set_schema(K::SCHEMA)?;
        self.step("activate")
    }

    fn quiesce(&self) -> Result<(), DomainError> {
        self.step("quiesce")
    }

    fn resume(&self) -> Result<(), DomainError> {
        self.step("resume")
    }

    fn resize(&self, capacity: u64) -> Result<(), DomainError> {
        if self.is("resize", "early") {
            self.host.storage().set_bytes("capacity", &capacity.to_le_bytes())?;
        }
        self.step("resize")?;
        self.host.storage().set_bytes("capacity", &capacity.to_le_bytes())
    }

    fn claim(&self) -> Result<Claim, DomainError> {
        if !self.is("claim", "true") {
            return Ok(Claim::Nothing);
        }
        self.step("claim")?;
        let taken = self.stage.taken.load(Ordering::Acquire);
        Ok(if taken { Claim::Taken } else { Claim::Ours })
    }

    fn release(&self) -> Result<(), DomainError> {
        if self.is("claim", "true") { self.step("release") } else { Ok(()) }
    }

    fn attach_queue(&self, context: QueueContext) -> Result<Queue, DomainError> {
        self.step("attach")?;
        self.step(&format!("attach{}", context.queue.0))?;
        Ok(Queue { index: context.queue.0, held: Vec::new() })
    }

    fn detach_queue(&self, _: Queue) {
        let _ = self.step("detach");
    }

    fn submit(&self, queue: &mut Queue, batch: &mut Batch<'_>, completions: &mut Completions<'_>) {
        let take = self.number("take").unwrap_or(u64::MAX);
        let (mut taken, mut ended) = (0, Vec::new());
        while taken < take {
            let Some(request) = batch.next() else { break };
            taken += 1;
            let slot = proxy::slot_of(request.id().tag);
            self.stage.write(format!("{} got {}:{slot}", self.label, queue.index));
            let number = self.seen.fetch_add(1, Ordering::Relaxed) + 1;
            assert!(
                !self.is("break", "submit") && self.number("die_at") != Some(number),
                "request {number}"
            );
            if self.number("hang_at") == Some(number) {
                wait_for(&self.stage.release);
            }
            if self.number("bad_at") == Some(number) {
                completions.complete(request, Status::IoError);
            } else if self.is("cross", "true") || self.is("cross", "submit") {
                lock(&self.stage.kept).push((queue.index, request));
            } else if self.is("hold", "true") {
                queue.held.push(request);
            } else if self.is("backwards", "true") {
                ended.push(request);
            } else {
                completions.complete(request, Status::Ok);
            }
        }
        for request in ended.into_iter().rev() {
            completions.complete(request, Status::Ok);
        }
        if self.is("cross", "submit") {
            self.end_others(queue.index, completions);
        }
    }

    fn reap(&self, queue: &mut Queue, completions: &mut Completions<'_>) {
        assert!(
            !self.is("break", "reap") || !self.stage.release.load(Ordering::Acquire),
            "break=reap"
        );
        if self.is("cross", "true") {
            self.end_others(queue.index, completions);
        }
        if self.stage.release.load(Ordering::Acquire) {
            for request in queue.held.drain(..) {
                completions.complete(request, Status::Ok);
            }
        }
    }

    fn cancel(&self) {
        let _ = self.step("cancel");
    }

    fn memory_changed(&self, _: usize, _: usize, _: bool) {
        let _ = self.step("memory");
    }

    fn set_write_cache(&self, _: bool) {
        let _ = self.step("cache");
        if self.is("wait", "cache") {
            wait_for(&self.stage.release);
        }
        let number = self.cached.fetch_add(1, Ordering::Relaxed) + 1;
        assert!(!self.is("break", &format!("cache{number}")), "break=cache{number}");
    }
}

impl<K: Kind> Drop for Puppet<K> {
    fn drop(&mut self) {
        if self.is("wait", "drop") {
            wait_for(&self.stage.go);
        }
        self.stage.write(format!("{} dropped", self.label));
        assert!(!self.is("break", "drop"), "break=drop");
    }
}
