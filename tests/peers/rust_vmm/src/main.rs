//! A small VMM with one vhost-user disk: its guest writes and reads, and compares.
//!
//!     rust_vmm SOCKET QUEUES DEPTH
//!
//! Commands come on stdin, each is answered with a line: `pause`, `resume`, `reset`, `migrate SOCKET`
//! (with all that is in flight, to another device on the same disk), `cancel` (a migration that does
//! not take place), and `end`, which reads everything once more and prints counts as JSON.

mod device;
mod disk;
mod memory;

use std::io::BufRead;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{channel, Receiver};
use std::time::{Duration, Instant};

use device::Device;
use disk::{Disk, ROOM};
use memory::{Memory, PAGE};
use vmm_sys_util::eventfd::EventFd;

const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_millis(50);
const STALL: Duration = Duration::from_secs(30);

struct Vmm {
    device: Device,
    disk: Disk,
    memory: Memory,
    depth: usize,
    done: Instant,
    reconnected: u32,
}

impl Vmm {
    fn queues(&self) -> usize {
        self.disk.queues.len()
    }

    /// Wait for an interrupt, a while, and take what is complete.
    fn wait(&mut self) {
        let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut fds: Vec<_> = self.device.calls.iter().map(|call| poll(call.as_raw_fd())).collect();
        fds.push(libc::pollfd { fd: self.device.socket(), events: libc::POLLHUP, revents: 0 });
        // SAFETY: the array is as long as it says.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as u64, 20) };
        if fds[self.queues()].revents & libc::POLLHUP != 0 {
            self.device.reconnect(&self.memory, &self.disk.queues).expect("reconnect");
            self.reconnected += 1;
        }
        let before = self.disk.in_flight();
        for queue in 0..self.queues() {
            let _ = self.device.calls[queue].read();
            self.disk.complete(&self.memory, queue);
        }
        if before == 0 || self.disk.in_flight() < before {
            self.done = Instant::now();
        }
        let left = self.disk.in_flight();
        assert!(self.done.elapsed() < STALL, "nothing completes, {left} are in flight");
    }

    fn work(&mut self) {
        for queue in 0..self.queues() {
            if self.disk.fill(&mut self.memory, queue, self.depth) {
                self.kick(queue);
            }
        }
        self.wait();
    }

    fn kick(&self, queue: usize) {
        if self.disk.queues[queue].wants_kicks(&self.memory) {
            self.device.kicks[queue].write(1).expect("kick");
        }
    }

    fn work_for(&mut self, length: Duration) {
        let began = Instant::now();
        while began.elapsed() < length {
            self.work();
        }
    }

    /// What the guest and the device have written since the last time.
    fn dirty(&mut self) -> Vec<usize> {
        let mut pages = self.device.swap_log(&self.memory).expect("swap_log");
        pages.retain(|page| *page < self.memory.written.len());
        for (page, written) in self.memory.written.iter_mut().enumerate() {
            if std::mem::take(written) {
                pages.push(page);
            }
        }
        pages
    }

    fn copy_while_running(&mut self) -> Memory {
        let mut copy = Memory::new(self.memory.size);
        self.memory.written.fill(false);
        self.device.log(&self.memory, &self.disk.queues, true).expect("log");
        (0..self.memory.size / PAGE).for_each(|page| copy.copy_page(&self.memory, page));
        for _ in 0..ROUNDS {
            self.work_for(ROUND);
            for page in self.dirty() {
                copy.copy_page(&self.memory, page);
            }
        }
        copy
    }

    fn migrate(&mut self, path: &str) {
        let mut copy = self.copy_while_running();
        self.device.enable(false).expect("pause");
        for page in self.dirty() {
            copy.copy_page(&self.memory, page);
        }
        let destination = Device::connect(path, self.queues()).expect("connect");
        // The source goes; whatever it writes until then is lost.
        self.device = destination;
        for page in 0..self.memory.size / PAGE {
            let (one, other) = (page * PAGE, PAGE);
            assert!(self.memory.bytes(one, other) == copy.bytes(one, other), "page {page} differs");
        }
        self.memory = copy;
        self.device.set_up(&self.memory, &self.disk.queues).expect("set up");
        self.interrupt();
    }

    fn cancel(&mut self) {
        self.copy_while_running();
        self.device.enable(false).expect("pause");
        self.device.log(&self.memory, &self.disk.queues, false).expect("log");
        self.resume();
    }

    fn resume(&mut self) {
        self.device.enable(true).expect("resume");
        self.interrupt();
    }

    /// As after every pause: an interrupt may be lost.
    fn interrupt(&self) {
        self.device.calls.iter().for_each(|call: &EventFd| call.write(1).expect("call"));
    }

    fn finish(&mut self) {
        while self.disk.in_flight() > 0 {
            self.wait();
        }
    }

    fn reset(&mut self) {
        self.finish();
        self.device.reset().expect("reset");
        self.device.set_up(&self.memory, &self.disk.queues).expect("set up");
    }

    fn end(&mut self) {
        self.finish();
        let mut next = 0;
        self.disk.read_on(&mut self.memory, &mut next);
        while self.disk.in_flight() > 0 {
            self.kick(0);
            self.wait();
            self.disk.read_on(&mut self.memory, &mut next);
        }
        let disk::Counts { reads, writes, verified } = self.disk.counts;
        let reconnected = self.reconnected;
        println!(
            "{{\"reads\": {reads}, \"writes\": {writes}, \"verified\": {verified}, \
             \"reconnected\": {reconnected}}}"
        );
    }
}

fn lines() -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let _ = sender.send(line.expect("stdin"));
        }
    });
    receiver
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let queues: usize = arguments[2].parse().expect("queues");
    let mut device = Device::connect(&arguments[1], queues).expect("connect");
    let blocks = device.blocks().expect("configuration");
    let memory = Memory::new(queues * ROOM);
    let disk = Disk::new(blocks.min(4096), queues, u64::from(std::process::id()));
    device.set_up(&memory, &disk.queues).expect("set up");
    let (depth, done) = (arguments[3].parse().expect("depth"), Instant::now());
    let mut vmm = Vmm { device, disk, memory, depth, done, reconnected: 0 };
    let (commands, mut paused) = (lines(), false);
    println!("running");
    loop {
        let Ok(command) = commands.try_recv() else {
            if paused {
                std::thread::sleep(Duration::from_millis(5));
            } else {
                vmm.work();
            }
            continue;
        };
        match command.split_once(' ').unwrap_or((&command, "")) {
            ("pause", _) => vmm.device.enable(false).expect("pause"),
            ("resume", _) => vmm.resume(),
            ("reset", _) => vmm.reset(),
            ("migrate", path) => vmm.migrate(path),
            ("cancel", _) => vmm.cancel(),
            ("end", _) => return vmm.end(),
            _ => panic!("{command}: no such command"),
        }
        paused = command == "pause";
        println!("{command}: done");
    }
}
