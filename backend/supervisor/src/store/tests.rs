use super::*;
use crate::store::record::Object;
use channel::{Module, Region};
use rustix::fs::ftruncate;
use rustix::io::IoSliceMut;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixDatagram;
use tempfile::TempDir;

/// A service manager that keeps what it is told to, as systemd does.
struct Shelf {
    directory: TempDir,
    socket: UnixDatagram,
    limit: usize,
    entries: Vec<(String, OwnedFd)>,
    texts: Vec<String>,
}

impl Shelf {
    fn new(limit: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        Self { directory, socket, limit, entries: Vec::new(), texts: Vec::new() }
    }

    /// A store in it, which knows how much room there is.
    fn store(&self) -> Store {
        let manager = Manager::at(self.directory.path().join("notify").as_os_str()).unwrap();
        Store::of(Some(manager), Some(self.limit))
    }

    /// Looks at everything that it was told.
    fn look(&mut self) {
        while self.look_once() {}
    }

    /// Looks at one message, if there is one.
    fn look_once(&mut self) -> bool {
        let mut text = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut text)];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let Ok(received) = recvmsg(&self.socket, &mut parts, &mut ancillary, flags) else {
            return false;
        };
        let rights = |message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
            _ => Vec::new(),
        };
        let fds: Vec<OwnedFd> = ancillary.drain().flat_map(rights).collect();
        let text = std::str::from_utf8(&text[..received.bytes]).unwrap().to_owned();
        self.is_told(&text, fds);
        true
    }

    fn is_told(&mut self, text: &str, fds: Vec<OwnedFd>) {
        let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key));
        let name = value("FDNAME=").unwrap_or("stored").to_owned();
        if value("FDSTOREREMOVE=").is_some() {
            assert_eq!(value("FDSTORE="), None, "both in one message lose the descriptor");
            self.entries.retain(|(other, _)| *other != name);
        } else if value("FDSTORE=").is_some() {
            assert_eq!(fds.len(), 1, "all would get one name, in any order");
            assert_eq!(value("FDPOLL="), Some("0"), "it would be thrown out when it hangs up");
            for fd in fds {
                let file = Identity::of(&fd).unwrap();
                let is_there = |(_, other): &(String, OwnedFd)| {
                    Identity::of(other).unwrap().is_same_file(&file)
                };
                // Without a word, whatever its name is.
                if self.entries.len() < self.limit && !self.entries.iter().any(is_there) {
                    self.entries.push((name.clone(), fd));
                }
            }
        } else if value("BARRIER=").is_none() {
            self.texts.push(text.to_owned());
        }
    }

    /// What the next start is passed: newest first.
    fn passes(&self) -> Vec<(String, OwnedFd)> {
        let entries = self.entries.iter().rev();
        entries.map(|(name, fd)| (name.clone(), fd.try_clone().unwrap())).collect()
    }

    fn names(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.entries.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        names
    }
}

fn memory(len: u64) -> OwnedFd {
    let memfd = channel::memfd("test").unwrap();
    ftruncate(&memfd, len).unwrap();
    memfd
}

fn list(generation: u64, image: u64, region: u64) -> channel::Vault {
    channel::Vault {
        generation,
        live: Some(Module {
            name: "ramdisk".into(),
            version: "1".into(),
            path: "/x.so".into(),
            sha256: "ab".into(),
            signature: None,
            params: BTreeMap::new(),
            image,
        }),
        regions: vec![Region { key: "disk".into(), len: 4096, memfd: region }],
        ..channel::Vault::default()
    }
}

/// The vault of a disk in memory, as its first server says it.
fn ramdisk() -> Vault {
    let mut vault = Vault::default();
    vault.take(list(1, 1, 2), &[1, 2], vec![memory(100), memory(4096)]).unwrap();
    vault
}

fn started_as() -> StartedAs {
    StartedAs { domain: "ramdisk".into(), params: BTreeMap::new() }
}

fn keep(store: &mut Store, vault: &Vault) {
    store.keep(vault, 7, &started_as());
}

/// A disk that the service manager has, and the store that has told it.
fn kept() -> (Shelf, Store, Vault) {
    let mut shelf = Shelf::new(16);
    let (mut store, vault) = (shelf.store(), ramdisk());
    keep(&mut store, &vault);
    shelf.look();
    (shelf, store, vault)
}

#[test]
fn a_disk_comes_back_as_it_was() {
    let mut shelf = Shelf::new(16);
    let mut store = shelf.store();
    let vault = ramdisk();
    keep(&mut store, &vault);
    assert_eq!(store.facts().state, StoreState::Storing);
    shelf.look();
    store.has_looked();
    assert_eq!(shelf.names(), ["object-1", "object-2", "record-3"]);
    let held = store.facts();
    assert_eq!((held.state, held.entries, held.limit), (StoreState::Held, 3, Some(16)));
    let mut next = shelf.store();
    let kept = next.take_back(shelf.passes()).unwrap().expect("a disk");
    assert_eq!((kept.vault.list(), kept.sessions), (vault.list(), 7));
    assert_eq!(kept.started_as, started_as());
    let objects = kept.vault.give().unwrap().1;
    let lens: Vec<u64> =
        objects.iter().map(|fd| rustix::fs::fstat(fd).unwrap().st_size as u64).collect();
    assert_eq!(lens, [100, 4096]);
    assert_eq!(next.facts().lost, None);
}

#[test]
fn what_waits_for_an_upgrade_waits_on() {
    let mut shelf = Shelf::new(16);
    let mut vault = ramdisk();
    vault.drop_live("no server has lived");
    let mut store = shelf.store();
    for _ in 0..2 {
        keep(&mut store, &vault);
        shelf.look();
        store = shelf.store();
        vault = store.take_back(shelf.passes()).unwrap().expect("a disk").vault;
        assert!(vault.awaits_upgrade());
    }
    upgrade(&mut vault, 2);
    keep(&mut store, &vault);
    shelf.look();
    let kept = shelf.store().take_back(shelf.passes()).unwrap().expect("a disk");
    assert!(!kept.vault.awaits_upgrade());
}

/// Another module in another server, which numbers anew; the region stays.
fn upgrade(vault: &mut Vault, generation: u64) {
    let objects = vault.give().unwrap().1;
    let region = objects.last().unwrap().as_fd().try_clone_to_owned().unwrap();
    let numbers = [10 * generation, 10 * generation + 1];
    let list = list(generation, numbers[0], numbers[1]);
    vault.take(list, &numbers, vec![memory(200), region]).unwrap();
}

/// Whatever was said last, what is there is a whole disk: the one before, or the next.
#[test]
fn after_each_message_there_is_a_whole_disk() {
    let (mut shelf, mut store, mut vault) = kept();
    upgrade(&mut vault, 2);
    keep(&mut store, &vault);
    let mut generations = Vec::new();
    while shelf.look_once() {
        let kept = shelf.store().take_back(shelf.passes()).unwrap().expect("a disk");
        generations.push(kept.vault.list().unwrap().generation);
    }
    // The module, the record, two removals, the barrier.
    assert_eq!(generations, [1, 2, 2, 2, 2]);
    // The region is there under its first name.
    assert_eq!(shelf.names(), ["object-2", "object-4", "record-5"]);
}

#[test]
fn the_next_process_goes_on_with_the_names() {
    let mut shelf = Shelf::new(16);
    let mut vault = ramdisk();
    keep(&mut shelf.store(), &vault);
    for generation in 2..5 {
        shelf.look();
        let mut next = shelf.store();
        vault = next.take_back(shelf.passes()).unwrap().expect("a disk").vault;
        // Nothing has changed, and nothing is lost on the way.
        keep(&mut next, &vault);
        shelf.look();
        assert_eq!(shelf.entries.len(), 3, "{:?}", shelf.names());
        upgrade(&mut vault, generation);
        keep(&mut next, &vault);
    }
    shelf.look();
    assert_eq!(shelf.entries.len(), 3, "{:?}", shelf.names());
}

#[test]
fn an_exchanged_program_goes_on_with_the_names() {
    let (mut shelf, mut store, mut vault) = kept();
    upgrade(&mut vault, 2);
    // What was not said is said again.
    store.plan(record(&vault), vault.give().unwrap().1).unwrap();
    let packed = serde_json::to_string(&store.pack()).unwrap();
    drop(store);
    let mut next = Store::unpack(serde_json::from_str(&packed).unwrap());
    (next.manager, next.limit) = (shelf.store().manager, Some(16));
    keep(&mut next, &vault);
    shelf.look();
    assert_eq!(shelf.entries.len(), 3, "{:?}", shelf.names());
    let kept = shelf.store().take_back(shelf.passes()).unwrap().expect("a disk");
    assert_eq!(kept.vault.list().unwrap().generation, 2);
}

fn record(vault: &Vault) -> Record {
    let list = vault.list().unwrap().clone();
    let (awaits_upgrade, objects) = (vault.awaits_upgrade(), BTreeMap::new());
    Record { sessions: 7, started_as: started_as(), list, awaits_upgrade, objects }
}

#[test]
fn only_what_is_all_in_memory_is_kept() {
    let (mut shelf, mut store, mut vault) = kept();
    assert_eq!(shelf.entries.len(), 3);
    let file = channel::Stored { key: "image".into(), file: 3 };
    let with_file = channel::Vault { files: vec![file], ..list(2, 1, 2) };
    vault.take(with_file, &[3], vec![tempfile::tempfile().unwrap().into()]).unwrap();
    keep(&mut store, &vault);
    shelf.look();
    store.has_looked();
    assert_eq!((shelf.names(), store.facts().state), (vec![], StoreState::NotNeeded));
}

#[test]
fn a_store_without_room_is_said_and_holds_nothing_by_halves() {
    let mut shelf = Shelf::new(2);
    let mut store = shelf.store();
    keep(&mut store, &ramdisk());
    shelf.look();
    let facts = store.facts();
    assert_eq!((shelf.names(), facts.state), (vec![], StoreState::Failed));
    let why = facts.why.unwrap();
    assert!(why.contains("3 entries") && why.contains("FileDescriptorStoreMax"), "{why}");
    // There is room for one disk, and not for two.
    let mut shelf = Shelf::new(3);
    let mut store = shelf.store();
    let mut vault = ramdisk();
    for generation in 2..5 {
        keep(&mut store, &vault);
        shelf.look();
        let kept = shelf.store().take_back(shelf.passes()).unwrap().expect("a disk");
        assert_eq!(kept.vault.list(), vault.list());
        upgrade(&mut vault, generation);
    }
}

#[test]
fn a_manager_that_says_nothing_of_its_room_is_not_relied_on() {
    let mut shelf = Shelf::new(16);
    let mut store = shelf.store();
    store.limit = None;
    keep(&mut store, &ramdisk());
    shelf.look();
    store.has_looked();
    assert_eq!(store.facts().state, StoreState::Unconfirmed);
}

#[test]
fn a_manager_that_is_gone_or_does_not_look_holds_nothing_up() {
    let mut shelf = Shelf::new(16);
    let mut store = shelf.store();
    store.say("READY=1");
    while shelf.store().manager.unwrap().say("X=1", None).unwrap() {}
    keep(&mut store, &ramdisk());
    assert_eq!(store.facts().state, StoreState::Storing);
    assert!(store.deadline().is_some());
    shelf.look();
    store.pump(Instant::now());
    shelf.look();
    assert_eq!((shelf.names().len(), store.deadline()), (3, None));
    assert_eq!(shelf.texts[0], "READY=1\n");
    let mut store = shelf.store();
    drop(shelf);
    keep(&mut store, &ramdisk());
    let facts = store.facts();
    assert_eq!(facts.state, StoreState::Failed);
    assert!(facts.why.unwrap().contains("cannot be told"));
    assert_eq!(Store::default().facts().state, StoreState::None);
}

/// What the next start finds when `spoil` has been at the entries: the disk, or why there is none.
fn found(spoil: impl FnOnce(&mut Vec<(String, OwnedFd)>)) -> Result<KeptDisk, String> {
    let mut shelf = Shelf::new(16);
    keep(&mut shelf.store(), &ramdisk());
    shelf.look();
    let mut passed = shelf.passes();
    spoil(&mut passed);
    shelf.entries =
        passed.iter().map(|(name, fd)| (name.clone(), fd.try_clone().unwrap())).collect();
    let mut next = shelf.store();
    match next.take_back(passed)? {
        Some(disk) => Ok(disk),
        None => {
            next.pump(Instant::now());
            shelf.look();
            assert_eq!(shelf.names(), [""; 0], "what is of no use is removed");
            Err(next.facts().lost.unwrap_or_default())
        }
    }
}

fn replace(passed: &mut [(String, OwnedFd)], name: &str, by: OwnedFd) {
    let entry = passed.iter_mut().find(|(other, _)| other == name).unwrap();
    entry.1 = by;
}

fn record_that_says(text: &str) -> OwnedFd {
    let file = std::fs::File::from(memory(0));
    std::os::unix::fs::FileExt::write_all_at(&file, text.as_bytes(), 0).unwrap();
    file.into()
}

#[test]
fn what_is_wrong_with_the_store_is_found() {
    let gone = |name: &'static str| {
        found(move |passed| passed.retain(|(other, _)| other != name)).unwrap_err()
    };
    assert_eq!(gone("object-2"), "the disk: `object-2` is not there any more");
    assert_eq!(gone("record-3"), "the disk: the record is not there any more");
    let other = found(|passed| replace(passed, "object-2", memory(4096))).unwrap_err();
    assert_eq!(other, "the disk: `object-2` is another file than was stored");
    let short = found(|passed| {
        let (_, region) = passed.iter().find(|(name, _)| name == "object-2").unwrap();
        ftruncate(region, 1024).unwrap();
    });
    assert_eq!(short.unwrap_err(), "the disk: `object-2` has 1024 bytes, and had 4096");
    let no_record = found(|passed| replace(passed, "record-3", record_that_says("x")));
    assert!(no_record.unwrap_err().contains("the record is not understood"));
    let empty = r#"{"version":1,"program":"9","record":{}}"#;
    let empty = found(|passed| replace(passed, "record-3", record_that_says(empty)));
    assert!(empty.unwrap_err().contains("missing field"));
    // Another program could go on with it, so it stays.
    let newer = r#"{"version":9,"program":"7.0","record":{}}"#;
    let newer = found(|passed| replace(passed, "record-3", record_that_says(newer))).unwrap_err();
    assert!(newer.contains("of version 9 (of program 7.0)"), "{newer}");
    assert!(newer.contains("clean --what=fdstore"), "{newer}");
}

#[test]
fn what_is_none_of_ours_and_doubles_do_not_matter() {
    let disk = found(|passed| {
        passed.insert(0, ("stored".into(), memory(1)));
        passed.insert(0, (String::new(), memory(1)));
        passed.push(("object-1".into(), memory(100)));
        passed.push(("vhost-hotswap@vm1.socket".into(), memory(1)));
    });
    assert_eq!(disk.unwrap().vault.list(), ramdisk().list());
}

#[test]
fn a_change_that_was_cut_short_leaves_the_disk_before() {
    let (mut shelf, mut store, mut vault) = kept();
    upgrade(&mut vault, 2);
    keep(&mut store, &vault);
    // The module of the next did not find room; nothing was removed yet.
    shelf.limit = 3;
    assert!(shelf.look_once());
    shelf.limit = 16;
    assert!(shelf.look_once());
    let mut next = shelf.store();
    let kept = next.take_back(shelf.passes()).unwrap().expect("a disk");
    assert_eq!(kept.vault.list().unwrap().generation, 1);
    let lost = next.facts().lost.unwrap();
    assert_eq!(lost, "the last change: `object-4` is not there any more");
}

/// A record of this release, which later ones must be able to read.
const FIXTURE: &str = include_str!("record-1.json");

#[test]
fn a_record_of_the_first_release_is_understood_to_the_last_member() {
    let old: serde_json::Value = serde_json::from_str(FIXTURE).unwrap();
    let record: Record = serde_json::from_value(old["record"].clone()).unwrap();
    assert_eq!(old["version"], record::VERSION);
    assert_eq!(serde_json::to_value(&record).unwrap(), old["record"]);
    let (name, file) = ("object-1".to_owned(), record.objects[&1].file);
    assert_eq!(record.objects[&1], Object { name, file });
}
