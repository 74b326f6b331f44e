//! What is done otherwise than it should be, as a change of the stores.

use crate::inflight::trace::Store;

/// What a store is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// That the part was taken up.
    Features,
    Version,
    DescNum,
    LastBatchHead,
    RegionIndex,
    Mark,
    Next,
    Counter,
    Element,
    RingIndex,
}

/// A step of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Take,
    Publish,
    Start,
}

/// What is done otherwise than it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mutation {
    MarkBeforeCounter,
    MarksFromTheLast,
    NoMarks,
    BackFromTheFirst,
    BackWithMarks,
    ClearBeforeIndex,
    RegionIndexBeforeClear,
    RegionIndexBeforeRing,
    ListAfterIndex,
    NoListHead,
    IndexBeforeElements,
    NoIndexAtStart,
    VersionFirstAtStart,
    MarksLeftAtStart,
    NoIndexAhead,
    LastBatchNotCleared,
    RecoveredIndexBeforeClear,
    OrderByHead,
    PositionOfTheUsedIndex,
    CounterFromZero,
    ForgetInFlight,
}

pub(super) const MUTATIONS: [Mutation; 21] = {
    use Mutation::*;
    [
        MarkBeforeCounter,
        MarksFromTheLast,
        NoMarks,
        BackFromTheFirst,
        BackWithMarks,
        ClearBeforeIndex,
        RegionIndexBeforeClear,
        RegionIndexBeforeRing,
        ListAfterIndex,
        NoListHead,
        IndexBeforeElements,
        NoIndexAtStart,
        VersionFirstAtStart,
        MarksLeftAtStart,
        NoIndexAhead,
        LastBatchNotCleared,
        RecoveredIndexBeforeClear,
        OrderByHead,
        PositionOfTheUsedIndex,
        CounterFromZero,
        ForgetInFlight,
    ]
};

/// Changes the stores of a step; `what` says what a store is of.
pub(super) fn mutate(
    mutation: Mutation,
    step: Step,
    stores: &mut Vec<Store>,
    what: impl Fn(Store) -> What,
) {
    let first = |stores: &[Store], of| stores.iter().position(|s| what(*s) == of);
    let last = |stores: &[Store], of| stores.iter().rposition(|s| what(*s) == of);
    // Moves all stores of a kind in front of the first of another.
    let hoist = |stores: &mut Vec<Store>, moved: &[What], before| {
        let is_meant = |s: &Store| moved.contains(&what(*s));
        let meant: Vec<_> = stores.iter().copied().filter(is_meant).collect();
        stores.retain(|s| !is_meant(s));
        let at = first(stores, before).unwrap_or(stores.len());
        stores.splice(at..at, meant);
    };
    let is_off = |s: &Store| what(*s) == What::Mark && s.value == 0;
    match (mutation, step) {
        (Mutation::MarkBeforeCounter, Step::Take) => {
            for pair in stores.chunks_exact_mut(2) {
                if what(pair[0]) == What::Counter {
                    pair.swap(0, 1);
                }
            }
        }
        (Mutation::MarksFromTheLast, Step::Take) => {
            let marks = stores.iter().take_while(|s| !is_off(s)).count();
            let pairs: Vec<_> = stores[..marks].chunks_exact(2).rev().flatten().collect();
            let pairs: Vec<_> = pairs.into_iter().copied().collect();
            stores[..marks].copy_from_slice(&pairs);
        }
        (Mutation::NoMarks, Step::Take) => stores.clear(),
        (Mutation::BackFromTheFirst, Step::Take) => {
            let from = stores.iter().position(is_off).unwrap_or(stores.len());
            stores[from..].reverse();
        }
        (Mutation::BackWithMarks, Step::Take) => stores.retain(|s| !is_off(s)),
        (Mutation::ClearBeforeIndex, Step::Publish) => {
            hoist(stores, &[What::Mark], What::RingIndex);
        }
        (Mutation::RegionIndexBeforeClear, Step::Publish) => {
            hoist(stores, &[What::RegionIndex], What::Mark);
        }
        (Mutation::RegionIndexBeforeRing, Step::Publish) => {
            hoist(stores, &[What::RegionIndex], What::RingIndex);
        }
        (Mutation::ListAfterIndex, Step::Publish) => {
            hoist(stores, &[What::Element, What::RingIndex], What::Next);
        }
        (Mutation::NoListHead, Step::Publish) => {
            stores.retain(|s| what(*s) != What::LastBatchHead);
        }
        (Mutation::IndexBeforeElements, Step::Publish) => {
            hoist(stores, &[What::RingIndex], What::Element);
        }
        (Mutation::NoIndexAtStart, Step::Start) if last(stores, What::Version).is_some() => {
            stores.retain(|s| what(*s) != What::RegionIndex);
        }
        (Mutation::VersionFirstAtStart, Step::Start) => {
            if let Some(at) = last(stores, What::Version) {
                let version = stores.remove(at);
                stores.insert(1, version);
            }
        }
        (Mutation::MarksLeftAtStart, Step::Start) if last(stores, What::Version).is_some() => {
            stores.retain(|s| what(*s) != What::Mark);
        }
        (Mutation::NoIndexAhead, Step::Publish) => {
            let index = first(stores, What::RegionIndex);
            if let Some(at) = index.filter(|_| index != last(stores, What::RegionIndex)) {
                stores.remove(at);
            }
        }
        (Mutation::RecoveredIndexBeforeClear, Step::Start)
            if last(stores, What::Version).is_none() =>
        {
            hoist(stores, &[What::RegionIndex], What::Mark);
        }
        _ => {}
    }
}
