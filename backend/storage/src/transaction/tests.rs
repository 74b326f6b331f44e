use super::*;

/// The storage as one instance sees it.
struct Services<'a> {
    id: DomainId,
    storage: &'a Storage,
}

impl Services<'_> {
    fn region(&self, key: &str, len: u64) -> Result<Arc<HostRegion>, DomainError> {
        self.storage.region(self.id, key, len)
    }
    fn set_bytes(&self, key: &str, value: &[u8]) -> Result<(), DomainError> {
        self.storage.set_bytes(self.id, key, value)
    }
    fn set_file(&self, key: &str, file: File) -> Result<(), DomainError> {
        self.storage.set_file(self.id, key, file)
    }
    fn set_schema(&self, schema: u32) -> Result<(), DomainError> {
        self.storage.set_schema(self.id, schema)
    }
    fn bytes(&self, key: &str) -> Option<Arc<Vec<u8>>> {
        self.storage.bytes(key)
    }
    fn file(&self, key: &str) -> Option<File> {
        self.storage.file(key).unwrap()
    }
    fn region_len(&self, key: &str) -> u64 {
        self.storage.region_len(key)
    }
    fn schema(&self) -> u32 {
        self.storage.schema()
    }
}

fn services(storage: &Storage, id: u64) -> Services<'_> {
    Services { id: DomainId(id), storage }
}

#[test]
#[cfg_attr(miri, ignore = "regions are memfds")]
fn only_the_owner_changes_things_and_everything_moves_without_a_copy() {
    let storage = Storage::default();
    let (a, b) = (services(&storage, 1), services(&storage, 2));
    storage.move_to(a.id);
    let region = a.region("disk", 8192).unwrap();
    a.set_bytes("note", b"x").unwrap();
    a.set_schema(3).unwrap();
    assert!(
        b.region("disk", 8192).is_err()
            && b.set_bytes("note", b"y").is_err()
            && b.set_schema(4).is_err()
    );
    assert_eq!(
        (b.region_len("disk"), b.schema(), b.bytes("note").unwrap().as_slice()),
        (8192, 3, &b"x"[..])
    );
    storage.move_to(b.id);
    assert!(a.set_bytes("note", b"z").is_err());
    assert_eq!(b.region("disk", 8192).unwrap().base(), region.base());
    assert!(b.region("disk", 4096).unwrap_err().to_string().contains("8192"));
    assert!(storage.grow_region(a.id, "disk", 16384).is_err(), "it is not the owner any more");
    assert!(storage.grow_region(b.id, "disk", 4096).is_err(), "a region does not shrink");
    assert!(storage.grow_region(b.id, "other", 4096).is_err(), "there is none");
    let grown = storage.grow_region(b.id, "disk", 16384).unwrap();
    assert_eq!((grown.base(), a.region_len("disk")), (region.base(), 16384));
    b.set_bytes("note", b"y").unwrap();
    assert_eq!(storage.reclaim(a.id), 0);
    assert_eq!(b.bytes("note").unwrap().as_slice(), b"y");
}

#[test]
#[cfg_attr(miri, ignore = "regions are memfds")]
fn a_failure_once_marked_stays() {
    let storage = Storage::default();
    let (a, b) = (services(&storage, 1), services(&storage, 2));
    storage.move_to(a.id);
    storage.begin(b.id);
    assert!(storage.mark_failed("the first"));
    assert!(!storage.mark_failed("another"));
    storage.count("things", 2);
    storage.count("things", 1);
    storage.rollback();
    storage.reclaim(a.id);
    assert_eq!(storage.failure().as_deref(), Some("the first"));
    assert_eq!(storage.counters(), BTreeMap::from([("things".to_owned(), 3)]));
}

#[test]
#[cfg_attr(miri, ignore = "regions are memfds")]
fn what_is_not_taken_up_comes_back_as_it_was_and_nothing_else_stays() {
    let storage = Storage::default();
    let (a, b) = (services(&storage, 1), services(&storage, 2));
    let directory = |services: &Services<'_>| {
        services.file("file").map(|file| file.metadata().unwrap().is_dir())
    };
    storage.move_to(a.id);
    a.region("disk", 8192).unwrap();
    a.set_bytes("note", b"x").unwrap();
    a.set_file("file", File::open("/dev/null").unwrap()).unwrap();
    a.set_schema(3).unwrap();
    for takes_up in [false, true] {
        let before = storage.heap.owned(a.id);
        storage.begin(b.id);
        b.region("more", 4096).unwrap();
        for value in [b"1", b"2", b"3"] {
            b.set_bytes("note", value).unwrap();
            b.set_bytes("new", value).unwrap();
        }
        b.set_file("file", File::open("/").unwrap()).unwrap();
        b.set_schema(4).unwrap();
        if takes_up {
            storage.commit();
            storage.rollback();
            assert_eq!(storage.heap.owned(b.id).objects, 6, "what was replaced is freed");
            assert_eq!((b.bytes("note").unwrap().as_slice(), b.schema()), (&b"3"[..], 4));
            assert_eq!((b.region_len("more"), directory(&b)), (4096, Some(true)));
            assert!(a.set_schema(5).is_err());
        } else {
            storage.rollback();
            assert_eq!((storage.heap.owned(a.id), storage.heap.owned(b.id).objects), (before, 0));
            assert_eq!((a.bytes("note").unwrap().as_slice(), a.schema()), (&b"x"[..], 3));
            assert_eq!(
                (a.region_len("more"), a.bytes("new"), directory(&a)),
                (0, None, Some(false))
            );
            assert!(b.set_schema(5).is_err() && a.set_schema(3).is_ok());
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "regions are memfds")]
fn each_change_is_told_once_and_objects_keep_their_numbers() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    let storage = Arc::new(Storage::default());
    let told = Arc::<AtomicUsize>::default();
    storage.tell({
        let (storage, told) = (Arc::downgrade(&storage), Arc::clone(&told));
        move || {
            // It may look at the storage.
            storage.upgrade().unwrap().contents();
            told.fetch_add(1, Ordering::Relaxed);
        }
    });
    let news = || told.swap(0, Ordering::Relaxed);
    let numbers = || {
        let Contents { regions, bytes, files, .. } = storage.contents();
        let number = |number: Option<u64>| number.unwrap_or_default();
        [
            number(regions.first().map(|object| object.number)),
            number(bytes.first().map(|object| object.number)),
            number(files.first().map(|object| object.number)),
        ]
    };
    let (a, b) = (services(&storage, 1), services(&storage, 2));
    storage.move_to(a.id);
    a.region("disk", 4096).unwrap();
    a.set_bytes("note", b"x").unwrap();
    a.set_file("file", File::open("/dev/null").unwrap()).unwrap();
    a.set_schema(1).unwrap();
    assert_eq!(news(), 4);
    a.set_schema(1).unwrap();
    a.region("disk", 4096).unwrap();
    assert_eq!(news(), 0, "nothing has changed");
    let before = numbers();
    // One that changes nothing, one that is taken back, one that is committed.
    storage.begin(b.id);
    b.region("disk", 4096).unwrap();
    b.set_schema(1).unwrap();
    storage.commit();
    assert_eq!((news(), numbers()), (0, before));
    storage.begin(a.id);
    a.set_bytes("note", b"y").unwrap();
    a.set_schema(2).unwrap();
    storage.rollback();
    assert_eq!((news(), numbers()), (0, before));
    storage.begin(a.id);
    a.set_bytes("note", b"y").unwrap();
    assert_eq!(news(), 0, "not before it is committed");
    assert!(storage.mark_failed("lost") && news() == 1, "a failure is told at once");
    storage.mark_failed("another");
    storage.commit();
    assert_eq!(news(), 1);
    let now = numbers();
    assert_eq!((now[0], now[2]), (before[0], before[2]));
    assert!(!before.contains(&now[1]), "another object has another number");
    storage.begin(b.id);
    b.set_schema(3).unwrap();
    storage.commit();
    assert_eq!(news(), 1, "of a schema alone");
}

#[test]
#[cfg_attr(miri, ignore = "regions are memfds")]
fn another_storage_is_filled_with_what_there_is() {
    let (old, new) = (Storage::default(), Storage::default());
    let a = services(&old, 1);
    old.move_to(a.id);
    let region = a.region("disk", 8192).unwrap();
    let memfd = |region: &HostRegion| File::from(region.memfd().try_clone_to_owned().unwrap());
    std::os::unix::fs::FileExt::write_at(&memfd(&region), b"data", 100).unwrap();
    a.set_bytes("note", b"x").unwrap();
    a.set_file("file", File::open("/").unwrap()).unwrap();
    a.set_schema(7).unwrap();
    old.mark_failed("lost");
    old.count("things", 3);
    let contents = old.contents();
    let filling = || Filling {
        schema: contents.schema,
        regions: contents
            .regions
            .iter()
            .map(|region| {
                let len = region.object.len() as u64;
                let file = memfd(&region.object);
                assert!(HostRegion::from_memfd(file.try_clone().unwrap(), len + 1).is_err());
                (region.key.clone(), HostRegion::from_memfd(file, len).unwrap())
            })
            .collect(),
        bytes: contents
            .bytes
            .iter()
            .map(|bytes| (bytes.key.clone(), bytes.object.to_vec()))
            .collect(),
        files: contents
            .files
            .iter()
            .map(|file| (file.key.clone(), file.object.try_clone().unwrap()))
            .collect(),
        failure: contents.failure.clone(),
        counters: contents.counters.clone(),
    };
    for _ in 0..2 {
        new.fill(filling());
    }
    assert_eq!(new.heap.owned(HOST).objects, 4, "the root and three objects");
    new.begin(DomainId(5));
    let b = services(&new, 5);
    let mapped = b.region("disk", 8192).unwrap();
    let mut read = [0; 4];
    std::os::unix::fs::FileExt::read_at(&memfd(&mapped), &mut read, 100).unwrap();
    assert_eq!((&read, b.schema()), (b"data", 7));
    assert_eq!(b.bytes("note").unwrap().as_slice(), b"x");
    assert!(b.file("file").unwrap().metadata().unwrap().is_dir());
    assert_eq!(new.failure().as_deref(), Some("lost"));
    assert_eq!(new.counters()["things"], 3);
    new.commit();
}

#[test]
fn what_is_reclaimed_of_one_that_gives_the_storage_away_is_not_taken_from_the_next() {
    let storage = Storage::default();
    storage.move_to(DomainId(1));
    // So many that it takes its time to give them away.
    for key in 0..200 {
        storage.set_bytes(DomainId(1), &format!("{key}"), b"x").unwrap();
    }
    for round in 0..if cfg!(miri) { 3 } else { 500 } {
        let (old, next) = (DomainId(2 * round + 1), DomainId(2 * round + 2));
        storage.move_to(old);
        let start = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                start.wait();
                storage.reclaim(old);
            });
            start.wait();
            storage.move_to(next);
        });
        assert_eq!(storage.owner(), next, "in round {round}");
    }
}
