//! The vault: what there is, told to the supervisor; and what there was, taken from it.
//!
//! A message says all there is, with descriptors for what was not in the one before. It is sent
//! without waiting, because the guest may wait meanwhile: where there is no room, a thread sends
//! what there is then as soon as there is; where it fails otherwise, as for want of descriptors, it
//! does so again and again. If the supervisor knows of that, it is put aside, into a
//! channel of its own that nothing waits at: to wake a thread costs the guest's time, and may cost
//! this thread its CPU. The supervisor is told to look when the guest does not wait any more; until
//! then it looks only if it has to know.
//!
//! Invariant: an object's number is that of no other object of this process: twice the storage's
//! number, or twice the instance's and one.

use super::told::{Believed, Told, pairs, params};
use crate::sync::lock;
use channel::{Bytes, Channel, Module, RateLimits, Region, Stored, ToSupervisor, Vault};
use domain_abi::Capabilities;
use proxy::{DomainProxy, DomainRecord, Keeper, Kept, KeptModule, Saved};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::retry_on_intr;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;
use storage::{Contents, Filling, HostRegion, Numbered};

/// Most bytes at a key.
const MOST_BYTES: u64 = 64 << 20;

/// The name of the thread that sends what could not be sent at once.
const SENDS_LATER: &str = "vault";

/// How long after it could not be sent it is tried again, where more than room is missing.
const SEND_AGAIN: Duration = Duration::from_secs(1);

/// Says what the guest may do in a second now.
type Limits = Box<dyn Fn() -> RateLimits + Send + Sync>;

/// Tells the supervisor what there is.
pub(super) struct VaultSender {
    channel: Arc<Channel>,
    /// Where vaults go, if not into that.
    aside: Option<Arc<Channel>>,
    proxy: Weak<DomainProxy>,
    sent: Mutex<Sent>,
    believed: Mutex<Believed>,
    /// What the guest may do in a second.
    limits: Limits,
    expected: Mutex<Option<Expected>>,
}

/// What is told beside what the proxy keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Beside {
    believed: Believed,
    limits: RateLimits,
}

/// A vault that was made before it was wanted. What is in storage is not to be relied on.
struct Expected {
    vault: Vault,
    /// What it was made of.
    told: Arc<DomainRecord>,
    canary: Option<u64>,
    beside: Beside,
}

impl Expected {
    fn new(kept: &Kept, beside: Beside) -> Self {
        let (vault, canary) = (vault_of(kept, beside), kept.canary);
        Self { vault, told: Arc::clone(&kept.told), canary, beside }
    }

    /// Whether it is what would be made of this.
    fn is_of(&self, kept: &Kept, beside: Beside) -> bool {
        let number = |module: Option<&KeptModule>| module.map(instance);
        let image = |module: &Option<Module>| module.as_ref().map(|module| module.image);
        self.vault.generation == kept.generation
            && image(&self.vault.live) == number(kept.live.as_ref())
            && image(&self.vault.standby) == number(kept.standby.as_ref())
            && self.vault.fault == kept.fault
            && self.vault.required == kept.required.0
            && Arc::ptr_eq(&self.told, &kept.told)
            && self.canary == kept.canary
            && self.beside == beside
    }
}

/// What the supervisor has.
#[derive(Default)]
struct Sent {
    vault: Option<Vault>,
    objects: BTreeSet<u64>,
    /// It has not what there is.
    is_outdated: bool,
    /// Why, if it is not for want of room.
    failure: Option<String>,
    /// A thread is to send what there is then.
    is_awaited: bool,
    /// It is to be told to look.
    is_unseen: bool,
    /// It does not have the other end of the second channel any more.
    is_aside_gone: bool,
}

impl VaultSender {
    pub(super) fn new(
        channel: &Arc<Channel>,
        proxy: &Arc<DomainProxy>,
        believed: Believed,
        limits: Limits,
        hears_aside: bool,
    ) -> Self {
        let aside = || -> io::Result<Arc<Channel>> {
            let (ours, theirs) = channel::pair()?;
            channel.send(&ToSupervisor::Aside, &[theirs.as_fd()])?;
            Ok(Arc::new(ours))
        };
        Self {
            channel: Arc::clone(channel),
            aside: hears_aside.then(aside).and_then(Result::ok),
            proxy: Arc::downgrade(proxy),
            sent: Mutex::default(),
            believed: Mutex::new(believed),
            limits,
            expected: Mutex::default(),
        }
    }

    /// What the driver of the last session believes.
    pub(super) fn believed(&self) -> Believed {
        *lock(&self.believed)
    }

    /// That of the session that runs believes this from now on.
    pub(super) fn believes(&self, believed: Believed) {
        if std::mem::replace(&mut *lock(&self.believed), believed) != believed
            && let Some(proxy) = self.proxy.upgrade()
        {
            proxy.keep_again();
        }
    }

    /// The supervisor has nothing of what it was told.
    pub(super) fn forget(&self) {
        let mut sent = lock(&self.sent);
        (sent.vault, sent.objects) = (None, BTreeSet::new());
    }

    fn beside(&self) -> Beside {
        Beside { believed: self.believed(), limits: (self.limits)() }
    }

    fn send(&self, sent: &mut Sent, kept: &Kept) {
        let beside = self.beside();
        let expected = lock(&self.expected).take_if(|expected| expected.is_of(kept, beside));
        // What was expected comes while the guest waits.
        let may_wake = expected.is_none();
        let vault = match expected {
            Some(Expected { vault, .. }) => with_storage(vault, &kept.storage),
            None => vault_of(kept, beside),
        };
        debug_assert_eq!(vault, vault_of(kept, beside), "it was made of something else");
        self.send_vault(sent, vault, kept);
        if may_wake && std::mem::take(&mut sent.is_unseen) {
            // Where there is no room, there is something to be heard.
            let _ = self.channel.try_send(&ToSupervisor::Look, &[]);
        }
    }

    const fn is_aside_used(&self, sent: &Sent) -> bool {
        self.aside.is_some() && !sent.is_aside_gone
    }

    /// The channel for vaults.
    fn way(&self, sent: &Sent) -> &Arc<Channel> {
        self.aside.as_ref().filter(|_| !sent.is_aside_gone).unwrap_or(&self.channel)
    }

    fn send_vault(&self, sent: &mut Sent, vault: Vault, kept: &Kept) {
        if sent.vault.as_ref() == Some(&vault) {
            (sent.is_outdated, sent.failure) = (false, None);
            return;
        }
        let objects: BTreeSet<u64> = vault.objects().into_iter().collect();
        let new: Vec<u64> = objects.difference(&sent.objects).copied().collect();
        let (result, vault) = self.send_new(self.way(sent), vault, new, kept);
        let is_gone = |error: &io::Error| {
            matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
        };
        match result {
            Ok(true) => {
                (sent.vault, sent.objects) = (Some(vault), objects);
                (sent.is_outdated, sent.failure) = (false, None);
                sent.is_unseen = self.is_aside_used(sent);
            }
            Ok(false) => self.owe(sent, None),
            Err(error) if is_gone(&error) && self.is_aside_used(sent) => {
                // The supervisor is a program now that does not know of it.
                (sent.is_aside_gone, sent.objects) = (true, BTreeSet::new());
                self.send_vault(sent, vault, kept);
            }
            Err(error) if is_gone(&error) => {
                (sent.is_outdated, sent.failure) = (false, None);
                log::debug!("the supervisor is gone, and keeps nothing: {error}");
            }
            Err(error) => self.owe(sent, Some(error.to_string())),
        }
    }

    /// `false` if there is no room for it.
    fn send_new(
        &self,
        way: &Channel,
        vault: Vault,
        new: Vec<u64>,
        kept: &Kept,
    ) -> (io::Result<bool>, Vault) {
        let bytes = kept.storage.bytes.iter().filter(|bytes| new.contains(&stored(bytes)));
        let made = bytes.map(|bytes| Ok((stored(bytes), memfd_of(&bytes.object)?)));
        let made: Vec<(u64, File)> = match made.collect::<io::Result<_>>() {
            Ok(made) => made,
            Err(error) => return (Err(error), vault),
        };
        let find = |number: u64| -> Option<BorrowedFd<'_>> {
            let storage = &kept.storage;
            let modules = kept.live.iter().chain(&kept.standby);
            let modules = modules.map(|module| (instance(module), module.image.as_fd()));
            let regions =
                storage.regions.iter().map(|object| (stored(object), object.object.memfd()));
            let files = storage.files.iter().map(|object| (stored(object), object.object.as_fd()));
            let made = made.iter().map(|(number, file)| (*number, file.as_fd()));
            let mut all = modules.chain(regions).chain(files).chain(made);
            all.find(|(known, _)| *known == number).map(|(_, descriptor)| descriptor)
        };
        let descriptors: Option<Vec<_>> = new.iter().map(|&number| find(number)).collect();
        let descriptors = descriptors.expect("each object of a vault is in what it was made of");
        // It is large: it is put into the message, and taken out again.
        let message = ToSupervisor::Vault { vault: Box::new(vault), new };
        let sent = way.try_send(&message, &descriptors);
        let ToSupervisor::Vault { vault, .. } = message else { unreachable!("it is a vault") };
        (sent, *vault)
    }

    /// Has a thread send what there is when there is room; some time later, if there was a
    /// `failure`.
    fn owe(&self, sent: &mut Sent, failure: Option<String>) {
        sent.is_outdated = true;
        let has_failed = failure.is_some();
        let before = std::mem::replace(&mut sent.failure, failure);
        if let Some(why) = sent.failure.as_ref().filter(|why| before.as_ref() != Some(why)) {
            log::error!("the supervisor does not have what there is now, and is told later: {why}");
        }
        let is_awaited = std::mem::replace(&mut sent.is_awaited, true);
        if !has_failed {
            if !is_awaited {
                log::warn!("the supervisor does not read; it is told what there is when it does");
            }
            if self.is_aside_used(sent) {
                let _ = self.channel.try_send(&ToSupervisor::Look, &[]);
            }
        }
        if is_awaited {
            return;
        }
        let (way, proxy) = (Arc::clone(self.way(sent)), self.proxy.clone());
        let wait = move || {
            if has_failed {
                std::thread::sleep(SEND_AGAIN);
            } else {
                let _ = poll(&mut [PollFd::new(&*way, PollFlags::OUT)], None);
            }
            if let Some(proxy) = proxy.upgrade() {
                proxy.keep_again();
            }
        };
        if let Err(error) = std::thread::Builder::new().name(SENDS_LATER.to_owned()).spawn(wait) {
            log::error!("no thread to tell the supervisor what there is: {error}");
            sent.is_awaited = false;
        }
    }

    /// Waits until the supervisor has what there is, or is gone. Where that could not be sent, it
    /// is tried once more.
    ///
    /// # Errors
    /// Why the supervisor does not have it.
    pub(super) fn settle(&self) -> Result<(), String> {
        let mut is_tried = false;
        loop {
            let way = {
                let sent = lock(&self.sent);
                if !sent.is_outdated {
                    return Ok(());
                }
                if let Some(why) = sent.failure.as_ref().filter(|_| is_tried) {
                    return Err(why.clone());
                }
                is_tried = sent.failure.is_some();
                (!is_tried).then(|| Arc::clone(self.way(&sent)))
            };
            if let Some(way) = way {
                let wait = || poll(&mut [PollFd::new(&*way, PollFlags::OUT)], None);
                retry_on_intr(wait).map_err(|error| error.to_string())?;
            }
            let Some(proxy) = self.proxy.upgrade() else { return Ok(()) };
            proxy.keep_again();
        }
    }
}

/// As the proxy's keeper; the session has the other reference.
pub(super) struct AsKeeper(pub(super) Arc<VaultSender>);

impl Keeper for AsKeeper {
    fn keep(&self, kept: &dyn Fn() -> Kept) {
        let mut sent = lock(&self.0.sent);
        if std::thread::current().name() == Some(SENDS_LATER) {
            sent.is_awaited = false;
        }
        // Under the lock: what is newer is sent later.
        let kept = kept();
        self.0.send(&mut sent, &kept);
    }

    fn expect(&self, soon: &Kept) {
        *lock(&self.0.expected) = Some(Expected::new(soon, self.0.beside()));
    }
}

const fn stored<T>(object: &Numbered<T>) -> u64 {
    2 * object.number
}

const fn instance(module: &KeptModule) -> u64 {
    2 * module.number + 1
}

fn memfd_of(bytes: &[u8]) -> io::Result<File> {
    let file = File::from(channel::memfd("hotswap-bytes")?);
    file.write_all_at(bytes, 0)?;
    Ok(file)
}

fn vault_of(kept: &Kept, beside: Beside) -> Vault {
    let module = |module: &KeptModule| Module {
        name: module.name.clone(),
        version: module.version.clone(),
        path: PathBuf::from(&module.path),
        sha256: module.sha256.clone(),
        signature: module.signature.clone(),
        params: pairs(&module.params),
        image: instance(module),
    };
    let mut told = Told::new(&kept.told, beside.believed, beside.limits);
    told.canary = kept.canary;
    let vault = Vault {
        generation: kept.generation,
        live: kept.live.as_ref().map(module),
        standby: kept.standby.as_ref().map(module),
        fault: kept.fault.clone(),
        required: kept.required.0,
        told: serde_json::to_value(told).expect("it has nothing that JSON cannot say"),
        ..Vault::default()
    };
    with_storage(vault, &kept.storage)
}

/// A vault with this storage.
fn with_storage(vault: Vault, storage: &Contents) -> Vault {
    let region = |object: &Numbered<HostRegion>| Region {
        key: object.key.clone(),
        len: object.object.len() as u64,
        memfd: stored(object),
    };
    let bytes =
        |object: &Numbered<Vec<u8>>| Bytes { key: object.key.clone(), memfd: stored(object) };
    let file = |object: &Numbered<File>| Stored { key: object.key.clone(), file: stored(object) };
    Vault {
        schema: storage.schema,
        regions: storage.regions.iter().map(region).collect(),
        bytes: storage.bytes.iter().map(bytes).collect(),
        files: storage.files.iter().map(file).collect(),
        failure: storage.failure.clone(),
        counters: storage.counters.clone(),
        ..vault
    }
}

/// What another server has left, with its objects' descriptors in the order of [`Vault::objects`].
///
/// # Errors
/// In a sentence: it cannot be gone on with.
pub(super) fn saved_of(
    vault: &Vault,
    descriptors: Vec<OwnedFd>,
) -> Result<(Saved, Believed, Option<RateLimits>), String> {
    let objects = vault.objects();
    if objects.len() != descriptors.len() {
        return Err(format!(
            "the vault has {} objects, and {} descriptors came with it",
            objects.len(),
            descriptors.len()
        ));
    }
    let descriptors: BTreeMap<u64, OwnedFd> = objects.into_iter().zip(descriptors).collect();
    let file = |number: u64, key: &str| {
        let dup = descriptors[&number].try_clone();
        dup.map(File::from).map_err(|error| format!("`{key}` of the vault: {error}"))
    };
    let module = |module: &Module| -> Result<KeptModule, String> {
        Ok(KeptModule {
            number: 0,
            image: Arc::new(OwnedFd::from(file(module.image, &module.name)?)),
            name: module.name.clone(),
            version: module.version.clone(),
            path: module.path.to_string_lossy().into_owned(),
            sha256: module.sha256.clone(),
            signature: module.signature.clone(),
            params: params(&module.params),
        })
    };
    let about = |key: &str, error: io::Error| format!("`{key}` of the vault: {error}");
    let mut filling = Filling {
        schema: vault.schema,
        failure: vault.failure.clone(),
        counters: vault.counters.clone(),
        ..Filling::default()
    };
    for Region { key, len, memfd } in &vault.regions {
        let region = HostRegion::from_memfd(file(*memfd, key)?, *len);
        put(&mut filling.regions, key, region.map_err(|error| about(key, error))?)?;
    }
    for Bytes { key, memfd } in &vault.bytes {
        let bytes = read_all(&file(*memfd, key)?).map_err(|error| about(key, error))?;
        put(&mut filling.bytes, key, bytes)?;
    }
    for Stored { key, file: number } in &vault.files {
        put(&mut filling.files, key, file(*number, key)?)?;
    }
    let told: Told = serde_json::from_value(vault.told.clone())
        .map_err(|error| format!("what the guest was told is no such thing: {error}"))?;
    let (believed, limits, canary) = (told.believed(), told.limits, told.canary);
    let saved = Saved {
        generation: vault.generation,
        live: vault.live.as_ref().map(module).transpose()?,
        standby: vault.standby.as_ref().map(module).transpose()?,
        fault: vault.fault.clone(),
        told: told.record(),
        storage: filling,
        required: Capabilities(vault.required),
        canary,
    };
    Ok((saved, believed, limits))
}

/// Which one of two is meant could not be known.
fn put<V>(all: &mut BTreeMap<String, V>, key: &str, value: V) -> Result<(), String> {
    match all.insert(key.to_owned(), value) {
        None => Ok(()),
        Some(_) => Err(format!("`{key}` of the vault: it is there twice")),
    }
}

/// All of a memfd, whatever its position is: that is its sender's as well.
fn read_all(file: &File) -> io::Result<Vec<u8>> {
    let len = file.metadata()?.len();
    if len > MOST_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("it has {len} bytes")));
    }
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}
