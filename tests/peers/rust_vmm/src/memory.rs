//! Guest memory, and which of its pages the guest itself has written.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{fence, Ordering};

pub const PAGE: usize = 4096;

pub struct Memory {
    pub file: File,
    pub size: usize,
    pub base: *mut u8,
    pub written: Vec<bool>,
}

impl Memory {
    pub fn new(size: usize) -> Memory {
        // SAFETY: the descriptor is new and ours, and the mapping is never undone.
        let (file, base) = unsafe {
            let file = File::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC));
            file.set_len(size as u64).expect("guest memory");
            let flags = libc::PROT_READ | libc::PROT_WRITE;
            let fd = file.as_raw_fd();
            let base = libc::mmap(std::ptr::null_mut(), size, flags, libc::MAP_SHARED, fd, 0);
            assert_ne!(base, libc::MAP_FAILED, "mmap of guest memory");
            (file, base as *mut u8)
        };
        Memory { file, size, base, written: vec![false; size / PAGE] }
    }

    pub fn user_address(&self, at: usize) -> u64 {
        assert!(at < self.size);
        self.base as u64 + at as u64
    }

    pub fn write(&mut self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.size);
        for page in at / PAGE..=(at + bytes.len() - 1) / PAGE {
            self.written[page] = true;
        }
        // SAFETY: it is within the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(at), bytes.len()) }
    }

    /// After everything before it.
    pub fn publish(&mut self, at: usize, index: u16) {
        fence(Ordering::SeqCst);
        self.write(at, &index.to_le_bytes());
        fence(Ordering::SeqCst);
    }

    pub fn bytes(&self, at: usize, count: usize) -> &[u8] {
        assert!(at + count <= self.size);
        // SAFETY: it is within the mapping; who writes there is done with it.
        unsafe { std::slice::from_raw_parts(self.base.add(at), count) }
    }

    pub fn index(&self, at: usize) -> u16 {
        // SAFETY: it is within the mapping, and aligned.
        let index = unsafe { (self.base.add(at) as *const u16).read_volatile() };
        fence(Ordering::SeqCst);
        u16::from_le(index)
    }

    pub fn copy_page(&mut self, from: &Memory, page: usize) {
        let source = from.bytes(page * PAGE, PAGE).as_ptr();
        // SAFETY: both are whole pages of mappings that do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(source, self.base.add(page * PAGE), PAGE) }
    }
}
