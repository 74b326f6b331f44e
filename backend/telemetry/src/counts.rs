//! Counters of requests, as they are read by the process that shows them.
//!
//! They are read while a worker writes them, so that two of them may be of moments that are a batch
//! apart. Each for itself never goes back.

use crate::buckets::{BUCKETS, end};
use crate::counters::{
    BYTES, ERRORS, FIRST_BUCKET, IN_FLIGHT, LINE_HEAD, LINE_WORDS, OPERATION_WORDS, Operation,
    SUM_NS, bytes,
};
use rustix::fs::{SealFlags, fcntl_add_seals};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

/// Makes a memfd the memory of so many queues' counters.
///
/// # Errors
/// There is no memory.
pub fn make(memfd: OwnedFd, queues: u16) -> io::Result<File> {
    let file = File::from(memfd);
    file.set_len(bytes(queues))?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(file)
}

/// The counters of an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OperationCounts {
    /// Which.
    pub operation: Operation,
    /// Bytes of the requests that were answered.
    pub bytes: u64,
    /// How many were answered with an error.
    pub errors: u64,
    /// How long they took together, in nanoseconds.
    pub sum_ns: u64,
    /// How many took how long.
    pub buckets: Vec<u64>,
}

impl OperationCounts {
    fn of(operation: Operation, words: &[u64]) -> Self {
        Self {
            operation,
            bytes: words[BYTES],
            errors: words[ERRORS],
            sum_ns: words[SUM_NS],
            buckets: words[FIRST_BUCKET..][..BUCKETS].to_vec(),
        }
    }

    /// How many were answered.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// As JSON: of the buckets those that are not empty, each with its end in nanoseconds (null for
    /// the last) and its own count.
    #[must_use]
    pub fn json(&self) -> Value {
        let buckets = self.buckets.iter().enumerate().filter(|(_, count)| **count > 0);
        let buckets: Vec<Value> = buckets.map(|(at, count)| json!([end(at), count])).collect();
        json!({
            "requests": self.requests(), "bytes": self.bytes, "errors": self.errors,
            "latency": {"sum_ns": self.sum_ns, "buckets": buckets},
        })
    }
}

/// The counters of a queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueCounts {
    /// Requests that were taken and are not answered.
    pub in_flight: u64,
    /// By operation.
    pub operations: Vec<OperationCounts>,
}

impl QueueCounts {
    /// As JSON.
    #[must_use]
    pub fn json(&self, queue: usize) -> Value {
        let operations =
            self.operations.iter().map(|of| (of.operation.name().to_owned(), of.json()));
        json!({
            "index": queue, "in_flight": self.in_flight,
            "operations": operations.collect::<Map<_, _>>(),
        })
    }
}

/// Reads the counters of so many queues.
///
/// # Errors
/// The file is too short, or cannot be read.
pub fn read(file: &File, queues: u16) -> io::Result<Vec<QueueCounts>> {
    let mut bytes = vec![0; bytes(queues) as usize];
    file.read_exact_at(&mut bytes, 0)?;
    let words: Vec<u64> = bytes
        .chunks_exact(size_of::<u64>())
        .map(|word| u64::from_ne_bytes(word.try_into().expect("eight bytes")))
        .collect();
    let queue = |line: &[u64]| {
        let operations = line[LINE_HEAD..].chunks_exact(OPERATION_WORDS);
        QueueCounts {
            in_flight: line[IN_FLIGHT],
            operations: Operation::ALL
                .into_iter()
                .zip(operations)
                .map(|(operation, words)| OperationCounts::of(operation, words))
                .collect(),
        }
    };
    Ok(words.chunks_exact(LINE_WORDS).map(queue).collect())
}

/// No requests are in flight: what has counted them is dead.
///
/// # Errors
/// The file is too short, or cannot be written.
pub fn none_in_flight(file: &File, queues: u16) -> io::Result<()> {
    (0..queues).try_for_each(|queue| {
        let word = bytes(queue) + (IN_FLIGHT * size_of::<u64>()) as u64;
        file.write_all_at(&0_u64.to_ne_bytes(), word)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counters::Counters;
    use rustix::fs::{MemfdFlags, memfd_create};

    fn memory(queues: u16) -> File {
        let memfd = memfd_create("counters", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
        make(memfd.unwrap(), queues).unwrap()
    }

    #[test]
    fn what_one_process_counts_another_reads_and_goes_on_with() {
        let file = memory(2);
        let first = Counters::map(&file, 2).unwrap();
        let line = first.line(1).unwrap();
        line.answered(Operation::Read, 16, 16 << 12, 5_000);
        line.answered(Operation::Read, 1, 512, 1);
        line.failed(Operation::Flush);
        line.set_in_flight(7);
        let next = Counters::map(&file.try_clone().unwrap(), 2).unwrap();
        next.line(1).unwrap().answered(Operation::Read, 1, 512, u64::MAX / 2);
        next.line(0).unwrap().answered(Operation::Other, 1, 0, 1024);
        let read = read(&file, 2).unwrap();
        assert_eq!(read[1].in_flight, 7);
        let reads = &read[1].operations[0];
        assert_eq!((reads.requests(), reads.bytes), (18, (16 << 12) + 1024));
        assert_eq!(reads.sum_ns, 16 * 5_000 + 1 + u64::MAX / 2);
        let told = json!([[1024, 1], [5120, 16], [null, 1]]);
        assert_eq!(reads.json()["latency"]["buckets"], told);
        assert_eq!(read[1].operations[2].errors, 1);
        assert_eq!(read[0].json(0)["operations"]["other"]["requests"], 1);
        assert_eq!(read[0].operations[0].requests(), 0);
        line.set_in_flight(7);
        let before = super::read(&file, 2).unwrap();
        assert_eq!(before[1].in_flight, 7);
        none_in_flight(&file, 2).unwrap();
        let after = super::read(&file, 2).unwrap();
        assert_eq!([after[0].in_flight, after[1].in_flight], [0, 0]);
        assert_eq!(after[1].operations, before[1].operations);
    }

    #[test]
    fn memory_that_may_become_shorter_is_not_mapped() {
        let memfd = memfd_create("counters", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
        let file = File::from(memfd.unwrap());
        file.set_len(bytes(1)).unwrap();
        assert!(Counters::map(&file, 1).is_err());
        assert!(Counters::map(&memory(1), 2).is_err());
        assert!(Counters::map(&memory(2), 1).is_ok());
    }
}
