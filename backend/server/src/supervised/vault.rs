//! The vault: what there is, told to the supervisor; and what there was, taken from it.
//!
//! A message says all there is, with descriptors for what was not in the one before. It is sent
//! without waiting, because the guest may wait meanwhile: where there is no room, a thread sends
//! what there is then as soon as there is.
//!
//! Invariant: an object's number is that of no other object of this process: twice the storage's
//! number, or twice the instance's and one.

use super::told::{Believed, Told, pairs, params};
use crate::sync::lock;
use channel::{Bytes, Channel, Module, Region, Stored, ToSupervisor, Vault};
use domain_abi::Capabilities;
use proxy::{DomainProxy, Keeper, Kept, KeptModule, Saved};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Weak};
use storage::{Filling, HostRegion, Numbered};

/// Most bytes at a key.
const MOST_BYTES: u64 = 64 << 20;

/// The name of the thread that does.
const WAITS_FOR_ROOM: &str = "vault";

/// Tells the supervisor what there is.
pub(super) struct VaultSender {
    channel: Arc<Channel>,
    proxy: Weak<DomainProxy>,
    sent: Mutex<Sent>,
    believed: Mutex<Believed>,
}

/// What the supervisor has.
#[derive(Default)]
struct Sent {
    vault: Option<Vault>,
    objects: BTreeSet<u64>,
    /// It has not what there is, for want of room.
    is_outdated: bool,
    /// A thread waits for room.
    is_awaited: bool,
}

impl VaultSender {
    pub(super) fn new(
        channel: &Arc<Channel>,
        proxy: &Arc<DomainProxy>,
        believed: Believed,
    ) -> Self {
        Self {
            channel: Arc::clone(channel),
            proxy: Arc::downgrade(proxy),
            sent: Mutex::default(),
            believed: Mutex::new(believed),
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

    fn send(&self, sent: &mut Sent, kept: &Kept) {
        let vault = vault_of(kept, self.believed());
        if sent.vault.as_ref() == Some(&vault) {
            sent.is_outdated = false;
            return;
        }
        let objects: BTreeSet<u64> = vault.objects().into_iter().collect();
        let new: Vec<u64> = objects.difference(&sent.objects).copied().collect();
        match self.send_new(&vault, new, kept) {
            Ok(true) => {
                let is_awaited = sent.is_awaited;
                *sent = Sent { vault: Some(vault), objects, is_outdated: false, is_awaited };
            }
            Ok(false) => self.owe(sent),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                sent.is_outdated = false;
                log::debug!("the supervisor is gone, and keeps nothing: {error}");
            }
            Err(error) => {
                sent.is_outdated = false;
                log::error!("the supervisor does not have what there is now: {error}");
            }
        }
    }

    /// `false` if there is no room for it.
    fn send_new(&self, vault: &Vault, new: Vec<u64>, kept: &Kept) -> io::Result<bool> {
        let mut made = Vec::new();
        for bytes in kept.storage.bytes.iter().filter(|bytes| new.contains(&stored(bytes))) {
            made.push((stored(bytes), memfd_of(&bytes.object)?));
        }
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
        let message = ToSupervisor::Vault { vault: Box::new(vault.clone()), new };
        self.channel.try_send(&message, &descriptors)
    }

    /// Has a thread send what there is when there is room.
    fn owe(&self, sent: &mut Sent) {
        sent.is_outdated = true;
        if std::mem::replace(&mut sent.is_awaited, true) {
            return;
        }
        log::warn!("the supervisor does not read; it is told what there is when it does");
        let (channel, proxy) = (Arc::clone(&self.channel), self.proxy.clone());
        let wait = move || {
            let _ = poll(&mut [PollFd::new(&*channel, PollFlags::OUT)], None);
            if let Some(proxy) = proxy.upgrade() {
                proxy.keep_again();
            }
        };
        if let Err(error) = std::thread::Builder::new().name(WAITS_FOR_ROOM.to_owned()).spawn(wait)
        {
            log::error!("no thread to tell the supervisor what there is: {error}");
            sent.is_awaited = false;
        }
    }

    /// Waits until the supervisor has what there is, or is gone.
    pub(super) fn settle(&self) {
        while lock(&self.sent).is_outdated {
            let ready = poll(&mut [PollFd::new(&*self.channel, PollFlags::OUT)], None);
            let Some(proxy) = self.proxy.upgrade().filter(|_| ready.is_ok()) else { return };
            proxy.keep_again();
        }
    }
}

/// As the proxy's keeper; the session has the other reference.
pub(super) struct AsKeeper(pub(super) Arc<VaultSender>);

impl Keeper for AsKeeper {
    fn keep(&self, kept: &dyn Fn() -> Kept) {
        let mut sent = lock(&self.0.sent);
        if std::thread::current().name() == Some(WAITS_FOR_ROOM) {
            sent.is_awaited = false;
        }
        // Under the lock: what is newer is sent later.
        let kept = kept();
        self.0.send(&mut sent, &kept);
    }
}

const fn stored<T>(object: &Numbered<T>) -> u64 {
    2 * object.number
}

const fn instance(module: &KeptModule) -> u64 {
    2 * module.number + 1
}

fn memfd_of(bytes: &[u8]) -> io::Result<File> {
    let file = File::from(memfd_create("hotswap-bytes", MemfdFlags::CLOEXEC)?);
    file.write_all_at(bytes, 0)?;
    Ok(file)
}

fn vault_of(kept: &Kept, believed: Believed) -> Vault {
    let module = |module: &KeptModule| Module {
        name: module.name.clone(),
        version: module.version.clone(),
        path: PathBuf::from(&module.path),
        sha256: module.sha256.clone(),
        params: pairs(&module.params),
        image: instance(module),
    };
    let storage = &kept.storage;
    let region = |object: &Numbered<HostRegion>| Region {
        key: object.key.clone(),
        len: object.object.len() as u64,
        memfd: stored(object),
    };
    let bytes =
        |object: &Numbered<Vec<u8>>| Bytes { key: object.key.clone(), memfd: stored(object) };
    let file = |object: &Numbered<File>| Stored { key: object.key.clone(), file: stored(object) };
    let told = Told::new(&kept.told, believed);
    Vault {
        generation: kept.generation,
        live: kept.live.as_ref().map(module),
        standby: kept.standby.as_ref().map(module),
        fault: kept.fault.clone(),
        schema: storage.schema,
        regions: storage.regions.iter().map(region).collect(),
        bytes: storage.bytes.iter().map(bytes).collect(),
        files: storage.files.iter().map(file).collect(),
        failure: storage.failure.clone(),
        counters: storage.counters.clone(),
        required: kept.required.0,
        told: serde_json::to_value(told).expect("it has nothing that JSON cannot say"),
    }
}

/// What another server has left, with its objects' descriptors in the order of [`Vault::objects`].
///
/// # Errors
/// In a sentence: it cannot be gone on with.
pub(super) fn saved_of(
    vault: &Vault,
    descriptors: Vec<OwnedFd>,
) -> Result<(Saved, Believed), String> {
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
        filling.regions.insert(key.clone(), region.map_err(|error| about(key, error))?);
    }
    for Bytes { key, memfd } in &vault.bytes {
        let bytes = read_all(&file(*memfd, key)?).map_err(|error| about(key, error))?;
        filling.bytes.insert(key.clone(), bytes);
    }
    for Stored { key, file: number } in &vault.files {
        filling.files.insert(key.clone(), file(*number, key)?);
    }
    let told: Told = serde_json::from_value(vault.told.clone())
        .map_err(|error| format!("what the guest was told is no such thing: {error}"))?;
    let believed = told.believed();
    let saved = Saved {
        generation: vault.generation,
        live: vault.live.as_ref().map(module).transpose()?,
        standby: vault.standby.as_ref().map(module).transpose()?,
        fault: vault.fault.clone(),
        told: told.record(),
        storage: filling,
        required: Capabilities(vault.required),
    };
    Ok((saved, believed))
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
