//! For tests in process: a guest's driver, written by hand, and a device of puppets.

use crate::raw_fd;
use domain_abi::Params;
use proxy::{DomainProxy, Options, Refusal, Report};
use puppet::{PuppetLoader, Stage};
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vhost_user_backend::VringT;
use virtqueue::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Long enough for anything here, and the end of a test that hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Entries of the ring.
pub(crate) const SIZE: u16 = 32;

/// Descriptor flags.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;

/// Where things are in guest memory; what is behind `END` is in no region.
const TABLE: u64 = 0x1000;
pub(crate) const AVAIL: u64 = 0x2000;
pub(crate) const USED: u64 = 0x3000;
/// As a ring is told of them.
pub(crate) const ADDRESSES: (u64, u64, u64) = (TABLE, AVAIL, USED);
const HEADERS: u64 = 0x4000;
const STATUS: u64 = 0x5000;
const DATA: u64 = 0x8000;
pub(crate) const END: u64 = 0x10_0000;

/// The status byte before there is one.
pub(crate) const NONE: u8 = 0xee;

/// A request of three descriptors: `3 * n`, `3 * n + 1`, `3 * n + 2`, for the `n`-th of ten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Of so many bytes.
    Read(u32),
    Write(u32),
    Flush,
    /// Of a kind that there is not.
    Unknown,
}

/// A driver, and the memory that it shares.
pub(crate) struct Guest {
    pub(crate) memory: GuestMemoryAtomic<GuestMemory>,
    has_event_idx: bool,
    /// Chains that were made available.
    offered: u16,
    /// Elements of the used ring that were looked at.
    seen: u16,
    /// What the device calls.
    call: EventFd,
}

/// A map as all guests here have it.
pub(crate) fn map() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), END as usize)]).expect("memory")
}

impl Guest {
    pub(crate) fn new(has_event_idx: bool) -> Self {
        let memory = GuestMemoryAtomic::new(map());
        let call = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        let guest = Self { memory, has_event_idx, offered: 0, seen: 0, call };
        (0..10).for_each(|n| guest.write(STATUS + n, NONE));
        guest
    }

    /// Tells the device where the ring is, and turns it on.
    pub(crate) fn start(&self, vring: &impl VringT<GuestMemoryAtomic<GuestMemory>>) {
        vring.set_queue_size(SIZE);
        vring.set_queue_info(TABLE, AVAIL, USED).expect("addresses");
        vring.set_queue_event_idx(self.has_event_idx);
        vring.set_call(Some(File::from(raw_fd::dup(&self.call).expect("a descriptor"))));
        vring.set_queue_ready(true);
        vring.set_enabled(true);
        self.calls();
    }

    pub(crate) fn write<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.memory().write_obj(value, GuestAddress(at)).expect("guest memory");
    }

    pub(crate) fn read<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.memory.memory().read_obj(GuestAddress(at)).expect("guest memory")
    }

    /// Writes a descriptor.
    pub(crate) fn descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = TABLE + 16 * u64::from(index);
        self.write(at, addr);
        self.write(at + 8, len);
        self.write(at + 12, flags);
        self.write(at + 14, next);
    }

    /// Writes down the `n`-th request, at sector `n`. Returns its first descriptor.
    pub(crate) fn request(&self, n: u16, kind: Kind) -> u16 {
        self.request_at(n, kind, DATA + 0x1000 * u64::from(n))
    }

    /// As [`request`](Self::request), with its data at `data`.
    pub(crate) fn request_at(&self, n: u16, kind: Kind, data: u64) -> u16 {
        assert!(n < 10, "there are ten requests");
        let (header, head) = (HEADERS + 16 * u64::from(n), 3 * n);
        let (code, len, flags) = match kind {
            Kind::Read(len) => (0u32, len, NEXT | WRITE),
            Kind::Write(len) => (1, len, NEXT),
            Kind::Flush => (4, 0, NEXT),
            Kind::Unknown => (77, 0, NEXT),
        };
        self.write(header, code);
        self.write(header + 8, u64::from(n));
        self.write(STATUS + u64::from(n), NONE);
        let behind = if len == 0 { head + 2 } else { head + 1 };
        self.descriptor(head, header, 16, NEXT, behind);
        self.descriptor(head + 1, data, len, flags, head + 2);
        self.descriptor(head + 2, STATUS + u64::from(n), 1, WRITE, 0);
        head
    }

    /// Writes down a flush whose header is in descriptor `head`, and whose status is in `status`,
    /// which many can share.
    pub(crate) fn flush_with(&self, head: u16, status: u16) {
        let header = HEADERS + 16 * u64::from(head);
        self.write(header, 4u32);
        self.descriptor(head, header, 16, NEXT, status);
        self.descriptor(status, STATUS, 1, WRITE, 0);
    }

    /// Makes a chain available.
    pub(crate) fn offer(&mut self, head: u16) {
        self.put(self.offered, head);
        self.offered = self.offered.wrapping_add(1);
    }

    /// Makes a chain available at a position of the available ring, as the last one.
    pub(crate) fn put(&self, position: u16, head: u16) {
        self.write(AVAIL + 4 + 2 * u64::from(position % SIZE), head);
        self.set_avail_idx(position.wrapping_add(1));
    }

    /// Writes down and makes available reads of 512 bytes.
    pub(crate) fn reads(&mut self, numbers: std::ops::Range<u16>) {
        for n in numbers {
            let head = self.request(n, Kind::Read(512));
            self.offer(head);
        }
    }

    pub(crate) fn set_avail_idx(&self, idx: u16) {
        self.write(AVAIL + 2, idx);
    }

    /// Asks not to be called, without event indices.
    pub(crate) fn refuse_calls(&self, refuse: bool) {
        self.write(AVAIL, u16::from(refuse));
    }

    /// Asks to be called when the `idx`-th answer is there, with event indices.
    pub(crate) fn call_at(&self, idx: u16) {
        self.write(AVAIL + 4 + 2 * u64::from(SIZE), idx);
    }

    /// What the device asks of the driver: the flag, or the event index.
    pub(crate) fn kicks_are_refused(&self) -> bool {
        self.read::<u16>(USED) == 1
    }

    pub(crate) fn kick_at(&self) -> u16 {
        self.read(USED + 4 + 8 * u64::from(SIZE))
    }

    pub(crate) fn used_idx(&self) -> u16 {
        self.read(USED + 2)
    }

    /// The elements of the used ring that are new: descriptor and length.
    pub(crate) fn used(&mut self) -> Vec<(u16, u32)> {
        let idx = self.used_idx();
        let mut used = Vec::new();
        while self.seen != idx {
            let at = USED + 4 + 8 * u64::from(self.seen % SIZE);
            used.push((self.read::<u32>(at) as u16, self.read(at + 4)));
            self.seen = self.seen.wrapping_add(1);
        }
        used
    }

    pub(crate) fn status(&self, n: u16) -> u8 {
        self.read(STATUS + u64::from(n))
    }

    /// How often the device has called since the last time.
    pub(crate) fn calls(&self) -> u64 {
        self.call.read().unwrap_or(0)
    }
}

/// A device of puppets.
pub(crate) struct Puppets {
    pub(crate) proxy: Arc<DomainProxy>,
    pub(crate) stage: Arc<Stage>,
}

impl Puppets {
    /// The domain `a` serves, and does as `script` says.
    pub(crate) fn start(queues: usize, script: &[&str]) -> Self {
        let stage = Stage::new();
        let params: Params = stage.params("a", script);
        let proxy = DomainProxy::start(Box::new(PuppetLoader), "plain", params, queues);
        Self { proxy: proxy.expect("a puppet starts"), stage }
    }

    /// The domain `b` serves, and does as `script` says; `a` is its standby.
    pub(crate) fn with_standby(queues: usize, script: &[&str]) -> Self {
        let puppets = Self::start(queues, &[]);
        puppets.upgrade("b", script).expect("an upgrade");
        puppets
    }

    pub(crate) fn upgrade(&self, label: &str, script: &[&str]) -> Result<Report, Refusal> {
        self.proxy.upgrade("plain", self.stage.params(label, script), Options::default())
    }
}

/// Copies all of guest memory.
pub(crate) fn copy(from: &GuestMemory, to: &GuestMemory) {
    let mut bytes = vec![0; END as usize];
    from.read_slice(&mut bytes, GuestAddress(0)).expect("guest memory");
    to.write_slice(&bytes, GuestAddress(0)).expect("guest memory");
}

/// Waits until `done`.
#[track_caller]
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Wakes nothing: the test calls the worker.
pub(crate) struct Silent;

impl proxy::Notifier for Silent {
    fn notify(&self) {}
}
