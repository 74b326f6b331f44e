//! A module that is newer than its host does without what the host lacks.

use domain_abi::{HostVtable, QueueIndex};
use domain_api::{Host, Params};
use domain_conformance::{TestHost, TestStorage};
use domain_host::leaked_table;
use std::mem::offset_of;

/// What a module makes of a table of which it is told that it ends after `size` bytes.
fn cut(host: &HostVtable, size: usize) -> Host {
    let mut table = *host;
    table.size = size as u32;
    // What a host of that age has there is anything.
    let bytes: *mut u8 = (&raw mut table).cast();
    // SAFETY: inside the table, which is leaked, and nothing reads past its `size` (that is what
    // is tested).
    unsafe { std::ptr::write_bytes(bytes.add(size), 0xa5, size_of::<HostVtable>() - size) };
    // SAFETY: never freed, and the host behind it neither.
    unsafe { Host::from_vtable(Box::leak(Box::new(table))) }
}

#[test]
fn a_module_does_without_what_an_older_host_lacks() {
    let side = leaked_table(TestHost::new(&TestStorage::new()));
    let (queue, served) = (QueueIndex(0), |host: Host| host.served_queues().collect::<Vec<_>>());
    let new = cut(side, size_of::<HostVtable>());
    assert!(new.notifier_fd(queue).is_some() && served(new) == [queue]);
    let unmarked = cut(side, offset_of!(HostVtable, storage_failed));
    unmarked.storage().mark_failed("not kept");
    unmarked.count("not kept", 1);
    assert_eq!((unmarked.storage().failure(), served(unmarked)), (None, vec![queue]));
    new.storage().mark_failed("the first");
    new.storage().mark_failed("another");
    assert_eq!(new.storage().failure().as_deref(), Some("the first"));
    let older = cut(side, offset_of!(HostVtable, served_queues));
    assert!(older.notifier_fd(queue).is_some() && served(older).is_empty());
    let oldest = cut(side, offset_of!(HostVtable, notifier_fd));
    assert!(oldest.notifier_fd(queue).is_none() && served(oldest).is_empty());
    assert_eq!(oldest.storage().schema(), 0);
}

#[test]
fn a_module_keeps_a_region_as_it_is_that_an_older_host_cannot_make_longer() {
    let services = TestHost::new(&TestStorage::new());
    services.own_storage();
    let side = leaked_table(services);
    let old = cut(side, offset_of!(HostVtable, region_grow)).storage();
    let region = old.region("disk", 4096).unwrap();
    old.grow_region("disk", &region, 4096).unwrap();
    let refusal = old.grow_region("disk", &region, 8192).unwrap_err().to_string();
    assert!(refusal.contains("too old"), "{refusal}");
    assert_eq!((region.len(), old.region_len("disk")), (4096, 4096));
    let new = cut(side, size_of::<HostVtable>()).storage();
    let other = new.region("other", 4096).unwrap();
    let refusal = new.grow_region("disk", &other, 8192).unwrap_err().to_string();
    assert!(refusal.contains("not the one"), "{refusal}");
    assert_eq!(other.len(), 4096, "it knows no bytes that are another's");
    new.grow_region("disk", &region, 8192).unwrap();
    assert_eq!((region.len(), new.region_len("disk")), (8192, 8192));
}

#[test]
fn a_module_is_told_that_an_older_host_opens_no_images() {
    let side = leaked_table(TestHost::new(&TestStorage::new()));
    let params = Params::from_pairs(["image=a"]).unwrap();
    let old = cut(side, offset_of!(HostVtable, image_open));
    let refusal = old.open_image("any", &params).unwrap_err().to_string();
    assert!(refusal.contains("too old"), "{refusal}");
    let new = cut(side, size_of::<HostVtable>());
    assert_eq!(new.open_image("any", &params).unwrap().info().capacity, 2 << 20);
}
