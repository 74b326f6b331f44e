//! For tests: every store to the region and to the used ring, in order.

use std::cell::RefCell;

/// One store: where, and what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Store {
    pub(crate) at: usize,
    pub(crate) value: u64,
    pub(crate) len: usize,
}

thread_local! {
    static STORES: RefCell<Option<Vec<Store>>> = const { RefCell::new(None) };
}

/// A store has been made.
pub(crate) fn note<T>(at: *const T, value: u64) {
    STORES.with_borrow_mut(|stores| {
        if let Some(stores) = stores {
            stores.push(Store { at: at as usize, value, len: size_of::<T>() });
        }
    });
}

/// The stores that `run` makes, in order.
pub(crate) fn record<R>(run: impl FnOnce() -> R) -> (R, Vec<Store>) {
    STORES.set(Some(Vec::new()));
    let result = run();
    (result, STORES.take().expect("just put there"))
}
