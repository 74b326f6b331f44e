//! ramdisk
