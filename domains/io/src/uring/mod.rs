//! io_uring for requests: the kernel does the I/O while the worker goes on.
//!
//! The rule of io_uring is that memory which a submission names stays where it is until its
//! completion has come. Here ownership says so: a [`Request`](domain_api::Request) is moved into
//! the [`Ring`] by [`push`](Ring::push) and comes out of [`advance`](Ring::advance) with its
//! result, so safe code can neither complete it nor touch its buffer while the kernel has it. A
//! ring that is dropped too early waits until the kernel is done (`end`); one that is forgotten
//! leaks, with all that the kernel may still use.
//!
//! **Waking.** The worker's own eventfd is registered with the ring, so a completion wakes the
//! worker without a thread or a system call of ours. While the owner is awake and looking, these
//! writes would only make it wake once more for nothing; where it is safe they are off from the
//! moment that it enters the kernel until `advance` returns `None`. No wake is lost, because
//! `advance` looks again *after* it has turned them on:
//!
//! 1. the kernel puts the completion on its list (`llist` cmpxchg) and, if the list was empty, sets
//!    `IORING_SQ_TASKRUN` (locked or), then looks whether wake-ups are off;
//! 2. we turn wake-ups on, then a full fence, then look at `IORING_SQ_TASKRUN`.
//!
//! If the kernel still sees "off" in 1, its flag was set before our fence, and 2 sees it. The
//! argument needs a full barrier in the middle of 1, which a locked instruction is on x86-64, and
//! that completions are posted by our own calls only, which is what `IORING_SETUP_DEFER_TASKRUN`
//! means. Elsewhere the wake-ups stay on.
//!
//! The flag may be set although there is nothing: a call hands over 20 completions at a time, and
//! clears the flag before it begins with what an earlier one has left; a completion that comes
//! meanwhile sets it, and is handed over by the same call. So `advance` does not call the kernel
//! until the flag is gone. If a call has brought nothing it turns wake-ups on and then asks with
//! `poll`, which looks at the kernel's lists themselves: what is not there yet finds them empty,
//! and wakes us.
//!
//! One thread uses a ring: the one that began it (`IORING_SETUP_SINGLE_ISSUER`). The kernel refuses
//! others, and we panic then; dropping is allowed anywhere. Making one takes 20 times as long as
//! beginning it (`IORING_SETUP_R_DISABLED`, Linux 6.1), so it can be made ahead, by a thread that
//! does not keep a guest waiting: [`PreparedRing`]. On older kernels any thread may use a ring, so
//! it is not made disabled. Before 5.18 beginning takes milliseconds: registering the eventfd waits
//! for a grace period there.
//!
//! Deliberately unknown: what a failed request means, and what is tried next. That is the domain's.

mod end;
mod in_flight;
mod port;
mod ring;

pub use end::EndWatch;
pub use in_flight::Work;
pub use port::RingJob;
pub use ring::{Ended, Files, PreparedRing, Ring};
