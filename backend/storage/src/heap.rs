//! The shared heap: objects that have an owner, change it, and can be reclaimed by it.
//!
//! A domain does not own memory by holding a pointer to it: it owns what the heap says it owns. So
//! an object changes hands without being copied ([`SharedHeap::move_to`]), and when a domain ends,
//! in whatever state, what it owned is found and freed ([`SharedHeap::reclaim`]), at a cost that
//! follows what it owned and not what exists.
//!
//! Invariants: each object has exactly one owner; its drop code is the host's, because only the
//! host makes objects; a reference to a reclaimed object is an error value, never a dangling
//! pointer. [`RRef`] and [`RRefVec`] are numbers, not pointers, and can be kept anywhere.
//!
//! Deliberately absent: speed. Nothing on the way of a request comes here; a domain looks its
//! objects up once and is lent what it finds.

use std::any::Any;
use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Who can own objects: an instance of a domain, by a number that is never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DomainId(pub u64);

/// Why an object cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeapError {
    /// It was freed or reclaimed.
    #[error("the object is gone: it was freed, or reclaimed from its owner")]
    Gone,
    /// It belongs to another domain.
    #[error("the object belongs to domain {}, not to domain {}", owner.0, asked.0)]
    NotOwner {
        /// Who owns it.
        owner: DomainId,
        /// Who asked.
        asked: DomainId,
    },
}

/// A reference to an object on the heap.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct RRef<T> {
    id: u64,
    _type: PhantomData<fn() -> T>,
}

impl<T> Clone for RRef<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for RRef<T> {}

impl<T> RRef<T> {
    /// Its number, which no other object of its heap ever has.
    #[must_use]
    pub const fn number(&self) -> u64 {
        self.id
    }
}

/// A reference to bytes, or other plain values, on the heap.
pub type RRefVec<T> = RRef<Vec<T>>;

/// What [`SharedHeap::reclaim`] freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reclaimed {
    /// Objects.
    pub objects: usize,
    /// Bytes, as said when they were put there.
    pub bytes: u64,
}

struct Object {
    value: Arc<dyn Any + Send + Sync>,
    bytes: u64,
}

#[derive(Default)]
struct Inner {
    next: u64,
    owners: HashMap<u64, DomainId>,
    objects: HashMap<DomainId, HashMap<u64, Object>>,
}

/// The heap. One per device.
#[derive(Default)]
pub struct SharedHeap {
    inner: Mutex<Inner>,
}

impl SharedHeap {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each critical section leaves the maps consistent before anything in it can panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a value there, of `bytes` bytes for the books.
    pub fn insert<T: Send + Sync + 'static>(
        &self,
        owner: DomainId,
        value: T,
        bytes: u64,
    ) -> RRef<T> {
        let mut inner = self.lock();
        inner.next += 1;
        let id = inner.next;
        inner.owners.insert(id, owner);
        inner
            .objects
            .entry(owner)
            .or_default()
            .insert(id, Object { value: Arc::new(value), bytes });
        RRef { id, _type: PhantomData }
    }

    /// Looks at an object, whatever owns it.
    ///
    /// # Errors
    /// It is gone.
    pub fn get<T: Send + Sync + 'static>(&self, reference: RRef<T>) -> Result<Arc<T>, HeapError> {
        let inner = self.lock();
        let owner = inner.owners.get(&reference.id).ok_or(HeapError::Gone)?;
        let object =
            inner.objects.get(owner).and_then(|o| o.get(&reference.id)).ok_or(HeapError::Gone)?;
        Arc::clone(&object.value).downcast().map_err(|_| HeapError::Gone)
    }

    /// Who owns an object.
    ///
    /// # Errors
    /// It is gone.
    pub fn owner<T>(&self, reference: RRef<T>) -> Result<DomainId, HeapError> {
        self.lock().owners.get(&reference.id).copied().ok_or(HeapError::Gone)
    }

    /// Gives an object from its owner `from` to `to`, in time that does not depend on its size.
    ///
    /// # Errors
    /// It is gone, or is not `from`'s to give.
    pub fn move_to<T>(
        &self,
        reference: RRef<T>,
        from: DomainId,
        to: DomainId,
    ) -> Result<(), HeapError> {
        let mut inner = self.lock();
        let object = inner.take(reference.id, from)?;
        inner.owners.insert(reference.id, to);
        inner.objects.entry(to).or_default().insert(reference.id, object);
        Ok(())
    }

    /// Frees one object. What was looked up before stays alive until it is let go.
    ///
    /// # Errors
    /// It is gone, or belongs to another owner.
    pub fn free<T>(&self, reference: RRef<T>, owner: DomainId) -> Result<(), HeapError> {
        let object = self.lock().take(reference.id, owner)?;
        // After the lock: the value's drop code may take its time.
        drop(object);
        Ok(())
    }

    /// Frees everything that `owner` owns.
    pub fn reclaim(&self, owner: DomainId) -> Reclaimed {
        let objects = {
            let mut inner = self.lock();
            let objects = inner.objects.remove(&owner).unwrap_or_default();
            for id in objects.keys() {
                inner.owners.remove(id);
            }
            objects
        };
        Reclaimed {
            objects: objects.len(),
            bytes: objects.values().map(|object| object.bytes).sum(),
        }
    }

    /// How much `owner` owns.
    #[must_use]
    pub fn owned(&self, owner: DomainId) -> Reclaimed {
        let inner = self.lock();
        inner.objects.get(&owner).map_or_else(Reclaimed::default, |objects| Reclaimed {
            objects: objects.len(),
            bytes: objects.values().map(|object| object.bytes).sum(),
        })
    }
}

impl Inner {
    fn take(&mut self, id: u64, owner: DomainId) -> Result<Object, HeapError> {
        let found = *self.owners.get(&id).ok_or(HeapError::Gone)?;
        if found != owner {
            return Err(HeapError::NotOwner { owner: found, asked: owner });
        }
        self.owners.remove(&id);
        let mine = self.objects.get_mut(&owner).ok_or(HeapError::Gone)?;
        let object = mine.remove(&id).ok_or(HeapError::Gone)?;
        if mine.is_empty() {
            self.objects.remove(&owner);
        }
        Ok(object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const A: DomainId = DomainId(1);
    const B: DomainId = DomainId(2);

    struct Counted(Arc<AtomicUsize>);
    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn an_object_moves_without_being_copied() {
        let heap = SharedHeap::default();
        let object: RRefVec<u8> = heap.insert(A, vec![7; 4096], 4096);
        let before = heap.get(object).unwrap().as_ptr();
        heap.move_to(object, A, B).unwrap();
        assert_eq!(heap.get(object).unwrap().as_ptr(), before);
        assert_eq!(heap.owner(object), Ok(B));
        assert_eq!(heap.move_to(object, A, B), Err(HeapError::NotOwner { owner: B, asked: A }));
        assert_eq!(heap.free(object, A), Err(HeapError::NotOwner { owner: B, asked: A }));
        assert_eq!(heap.owned(A), Reclaimed::default());
        assert_eq!(heap.owned(B), Reclaimed { objects: 1, bytes: 4096 });
    }

    #[test]
    fn reclaiming_frees_what_the_owner_had_and_nothing_else() {
        let heap = SharedHeap::default();
        let freed = Arc::new(AtomicUsize::new(0));
        let of_a: Vec<_> =
            (0..5).map(|_| heap.insert(A, Counted(Arc::clone(&freed)), 10)).collect();
        let of_b = heap.insert(B, Counted(Arc::clone(&freed)), 1);
        heap.move_to(of_a[0], A, B).unwrap();
        assert_eq!(heap.reclaim(A), Reclaimed { objects: 4, bytes: 40 });
        assert_eq!(freed.load(Ordering::Relaxed), 4);
        assert_eq!(heap.get(of_a[1]).err(), Some(HeapError::Gone));
        assert_eq!(heap.free(of_a[1], A), Err(HeapError::Gone));
        assert!(heap.get(of_a[0]).is_ok() && heap.get(of_b).is_ok());
        assert_eq!(heap.reclaim(A), Reclaimed::default());
        assert_eq!(heap.reclaim(B).objects, 2);
        assert_eq!(freed.load(Ordering::Relaxed), 6);
    }

    #[test]
    fn what_is_lent_outlives_reclaiming() {
        let heap = SharedHeap::default();
        let freed = Arc::new(AtomicUsize::new(0));
        let object = heap.insert(A, Counted(Arc::clone(&freed)), 0);
        let lent = heap.get(object).unwrap();
        heap.reclaim(A);
        assert_eq!(freed.load(Ordering::Relaxed), 0);
        drop(lent);
        assert_eq!(freed.load(Ordering::Relaxed), 1);
    }
}
