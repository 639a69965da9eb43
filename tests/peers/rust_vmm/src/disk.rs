//! The guest's driver of a virtio-blk device: random writes and reads, each compared with what the
//! block must hold.

use crate::memory::{Memory, PAGE};

pub const SIZE: u16 = 128;
/// Descriptors of a request: header, data, status.
const CHAIN: usize = 3;
const SLOTS: usize = SIZE as usize / CHAIN;
/// Of one queue: its ring's parts, then for each slot a page of data and one for the rest.
pub const ROOM: usize = (3 + 2 * SLOTS) * PAGE;
const IN: u32 = 0;
const OUT: u32 = 1;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const NO_NOTIFY: u16 = 1;

#[derive(Clone, Copy)]
struct Request {
    block: usize,
    write: bool,
}

pub struct Queue {
    pub at: usize,
    available: u16,
    used: u16,
    free: Vec<usize>,
    requests: [Option<Request>; SLOTS],
}

impl Queue {
    pub fn driver_area(&self) -> usize {
        self.at + PAGE
    }

    pub fn device_area(&self) -> usize {
        self.at + 2 * PAGE
    }

    /// Whether the device asks for kicks; nobody else would notice if it did not in time.
    pub fn wants_kicks(&self, memory: &Memory) -> bool {
        memory.index(self.device_area()) & NO_NOTIFY == 0
    }

    fn data(&self, slot: usize) -> usize {
        self.at + (3 + 2 * slot) * PAGE
    }
}

#[derive(Default)]
pub struct Counts {
    pub reads: u64,
    pub writes: u64,
    pub verified: u64,
}

pub struct Disk {
    pub queues: Vec<Queue>,
    pub counts: Counts,
    /// How often each block was written; 0: never.
    generations: Vec<u32>,
    busy: Vec<bool>,
    seed: u64,
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d049bb133111eb);
    x ^ (x >> 31)
}

fn content(block: usize, generation: u32) -> Vec<u8> {
    let seed = mix((block as u64) << 32 | generation as u64);
    (0..PAGE as u64 / 8).flat_map(|i| mix(seed.wrapping_add(i)).to_le_bytes()).collect()
}

impl Disk {
    pub fn new(blocks: usize, queues: usize, seed: u64) -> Disk {
        let queue = |i: usize| Queue {
            at: i * ROOM,
            available: 0,
            used: 0,
            free: (0..SLOTS).collect(),
            requests: [None; SLOTS],
        };
        Disk {
            queues: (0..queues).map(queue).collect(),
            counts: Counts::default(),
            generations: vec![0; blocks],
            busy: vec![false; blocks],
            seed,
        }
    }

    fn random(&mut self, below: usize) -> usize {
        self.seed = self.seed.wrapping_add(0x9e3779b97f4a7c15);
        (mix(self.seed) % below as u64) as usize
    }

    pub fn in_flight(&self) -> usize {
        self.queues.iter().map(|q| SLOTS - q.free.len()).sum()
    }

    /// Make random requests until `depth` are in flight; whether there are new ones.
    pub fn fill(&mut self, memory: &mut Memory, queue: usize, depth: usize) -> bool {
        let before = self.queues[queue].available;
        while SLOTS - self.queues[queue].free.len() < depth.min(SLOTS) {
            let block = self.random(self.busy.len());
            let write = self.generations[block] == 0 || self.random(2) == 0;
            if !self.busy[block] {
                self.request(memory, queue, Request { block, write });
            }
        }
        self.queues[queue].available != before
    }

    fn request(&mut self, memory: &mut Memory, queue: usize, request: Request) {
        let slot = self.queues[queue].free.pop().expect("a free slot");
        self.busy[request.block] = true;
        if request.write {
            self.generations[request.block] += 1;
        }
        let q = &mut self.queues[queue];
        let (data, rest) = (q.data(slot), q.data(slot) + PAGE);
        let mut header = [0u8; 17];
        header[..4].copy_from_slice(&if request.write { OUT } else { IN }.to_le_bytes());
        header[8..16].copy_from_slice(&(request.block as u64 * PAGE as u64 / 512).to_le_bytes());
        header[16] = 0xFF; // the status
        memory.write(rest, &header);
        if request.write {
            memory.write(data, &content(request.block, self.generations[request.block]));
        } else {
            memory.write(data, &[0xEE; PAGE]);
        }
        let flags = if request.write { NEXT } else { NEXT | WRITE };
        let first = slot * CHAIN;
        for (i, (at, length, flags)) in
            [(rest, 16, NEXT), (data, PAGE, flags), (rest + 16, 1, WRITE)].into_iter().enumerate()
        {
            let mut descriptor = [0u8; 16];
            descriptor[..8].copy_from_slice(&(at as u64).to_le_bytes());
            descriptor[8..12].copy_from_slice(&(length as u32).to_le_bytes());
            descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
            descriptor[14..].copy_from_slice(&((first + i + 1) as u16).to_le_bytes());
            memory.write(q.at + (first + i) * 16, &descriptor);
        }
        let entry = 4 + 2 * (q.available % SIZE) as usize;
        memory.write(q.driver_area() + entry, &(first as u16).to_le_bytes());
        q.available = q.available.wrapping_add(1);
        memory.publish(q.driver_area() + 2, q.available);
        q.requests[slot] = Some(request);
    }

    /// Take what is complete and compare it.
    pub fn complete(&mut self, memory: &Memory, queue: usize) {
        let device_area = self.queues[queue].device_area();
        while memory.index(device_area + 2) != self.queues[queue].used {
            let q = &mut self.queues[queue];
            let entry = device_area + 4 + 8 * (q.used % SIZE) as usize;
            let id = u32::from_le_bytes(memory.bytes(entry, 4).try_into().unwrap()) as usize;
            let slot = id / CHAIN;
            let request = q.requests.get_mut(slot).and_then(Option::take);
            let request = request.unwrap_or_else(|| panic!("{id} is used and was not in flight"));
            assert_eq!(id % CHAIN, 0, "no request begins at descriptor {id}");
            q.used = q.used.wrapping_add(1);
            q.free.push(slot);
            let data = q.data(slot);
            let Request { block, write } = request;
            assert_eq!(memory.bytes(data + PAGE + 16, 1), [0], "status of block {block}");
            self.busy[block] = false;
            if write {
                self.counts.writes += 1;
                continue;
            }
            self.counts.reads += 1;
            let wanted = content(block, self.generations[block]);
            assert!(memory.bytes(data, PAGE) == wanted, "block {block} is not what was written");
            self.counts.verified += 1;
        }
    }

    /// Read those from `next` on of the blocks that were written, as many as there is room for.
    pub fn read_on(&mut self, memory: &mut Memory, next: &mut usize) {
        while *next < self.generations.len() && !self.queues[0].free.is_empty() {
            if self.generations[*next] > 0 {
                self.request(memory, 0, Request { block: *next, write: false });
            }
            *next += 1;
        }
    }
}
