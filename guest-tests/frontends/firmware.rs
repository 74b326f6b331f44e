//! Firmware, a boot loader and its kernel, all read from the disk while that is upgraded.

use std::fs;
use std::path::Path;
use std::process::Command;

use guest_tests::debian::Debian;
use guest_tests::guest::fio::Fio;
use guest_tests::guest::{GuestOptions, Launch};
use guest_tests::initramfs;

use crate::stage::{
    FIO_SECONDS, FileDisk, NotHere, Outcome, Upgrades, beside, boot, end, finish, memory_disk, say,
};

/// QEMU's own BIOS.
pub fn seabios() -> Outcome {
    // GRUB shows its menu there, and waits for one if there is none.
    boots_from_disk(vec!["-vga".to_owned(), "std".to_owned()])
}

/// UEFI, which drives a disk in its own way.
pub fn ovmf() -> Outcome {
    let debian = Debian::chosen();
    let code = debian.path("usr/share/OVMF/OVMF_CODE_4M.fd");
    if !code.exists() {
        return Err(NotHere(format!("there is no {}", code.display())));
    }
    let directory = tempfile::tempdir().expect("a directory");
    let variables = directory.path().join("variables.fd");
    fs::copy(debian.path("usr/share/OVMF/OVMF_VARS_4M.fd"), &variables).expect("OVMF's variables");
    let drive =
        |file: &Path, more: &str| format!("if=pflash,format=raw,{more}file={}", file.display());
    boots_from_disk(vec![
        "-drive".to_owned(),
        drive(&code, "readonly=on,"),
        "-drive".to_owned(),
        drive(&variables, ""),
    ])
}

fn boots_from_disk(extra_args: Vec<String>) -> Outcome {
    let debian = Debian::chosen();
    if !debian.is_elsewhere() {
        return Err(NotHere("HOTSWAP_QEMU_ROOT names no other Debian".to_owned()));
    }
    let directory = guest_tests::daemon::disk_directory();
    make_bootable(&debian, &directory.path().join("disk.img"));
    let (disk, scratch) = (FileDisk::of(directory), memory_disk());
    let options = GuestOptions {
        vhost_sockets: vec![disk.daemon.socket().to_owned(), scratch.socket().to_owned()],
        boot_from_disk: true,
        extra_args,
        ..GuestOptions::default()
    };
    let (booting, guest) = beside(&Upgrades::File(&disk), || boot(options));
    // What the firmware has read, Linux reads as well: both boot from one image.
    let signature = guest.sh("dd if=/dev/vda bs=1 skip=510 count=2 2>/dev/null | od -An -tx1");
    assert_eq!(signature.trim(), "55 aa", "the boot sector's signature");
    let (count, report) = beside(&Upgrades::Memory(&scratch), || {
        finish(&guest, Fio::start_on(&guest, "vdb", FIO_SECONDS / 2))
    });
    let took = guest.boot_time().as_secs();
    end(guest, scratch);
    Ok(format!("{booting} upgrades in a boot of {took} s; then {}", say(count, &report)))
}

/// A disk that BIOS and UEFI can boot, with the kernel and the initramfs of all guests.
fn make_bootable(debian: &Debian, image: &Path) {
    let cache = tempfile::tempdir().expect("a directory");
    let files = initramfs::boot_files(debian, cache.path()).expect("a kernel");
    let launch = Launch { directory: cache.path(), boot_files: &files };
    let tree = tempfile::tempdir_in(debian.path("tmp")).expect("a directory there");
    let grub = tree.path().join("tree/boot/grub");
    fs::create_dir_all(&grub).expect("GRUB's directory");
    let menu = format!(
        "set timeout=0\nset timeout_style=hidden\nmenuentry linux {{\n  linux /vmlinuz {}\n  \
         initrd /initramfs.gz\n}}\n",
        launch.command_line()
    );
    fs::write(grub.join("grub.cfg"), menu).expect("GRUB's menu");
    let at = |name: &str| tree.path().join("tree").join(name);
    fs::copy(&files.kernel, at("vmlinuz")).expect("the kernel's copy");
    // Smaller, because a BIOS reads 32 KiB at a time, and waits for each.
    fs::copy(&files.initramfs, at("initramfs")).expect("the initramfs's copy");
    let packed = Command::new("gzip").args(["-1", "--suffix=.gz"]).arg(at("initramfs")).status();
    assert!(packed.is_ok_and(|status| status.success()), "gzip does not pack the initramfs");
    let inside = Path::new("/tmp").join(tree.path().file_name().expect("a name"));
    let output = Command::new("chroot")
        .arg(debian.path(""))
        .args(["/usr/bin/grub-mkrescue", "-o"])
        .arg(inside.join("disk.img"))
        .arg(inside.join("tree"))
        .output()
        .expect("chroot");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "grub-mkrescue failed: {said}");
    fs::copy(tree.path().join("disk.img"), image).expect("the disk's copy");
}
