//! A vhost-user device, set up, paused and migrated as cloud-hypervisor does it
//! (virtio-devices/src/vhost_user there), with the library it uses.

use std::fs::File;
use std::io::Read;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::disk::{Queue, SIZE};
use crate::memory::{Memory, PAGE};

const VERSION_1: u64 = 1 << 32;
const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();
const VRING_LOG: u32 = 1;
const PATIENCE: Duration = Duration::from_secs(60);

type Result<T> = std::result::Result<T, vhost::Error>;

pub struct Device {
    pub path: String,
    vu: Frontend,
    features: u64,
    protocol: VhostUserProtocolFeatures,
    inflight: Option<(VhostUserInflight, File)>,
    log: Option<Log>,
    pub kicks: Vec<EventFd>,
    pub calls: Vec<EventFd>,
}

struct Log {
    file: File,
    size: usize,
}

impl Log {
    fn new(memory: &Memory) -> Log {
        let size = (memory.size - 1) / PAGE / 8 + 1;
        // SAFETY: the descriptor is new and ours.
        let file =
            unsafe { File::from_raw_fd(libc::memfd_create(c"log".as_ptr(), libc::MFD_CLOEXEC)) };
        file.set_len(size as u64).expect("log");
        Log { file, size }
    }

    fn pages(&self) -> Vec<usize> {
        let mut bits = vec![0u8; self.size];
        std::os::unix::fs::FileExt::read_exact_at(&self.file, &mut bits, 0).expect("log");
        (0..self.size * 8).filter(|page| bits[page / 8] >> (page % 8) & 1 == 1).collect()
    }
}

impl Device {
    pub fn connect(path: &str, queues: usize) -> Result<Device> {
        let vu = connected(path, queues);
        let eventfds = || (0..queues).map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap()).collect();
        let mut device = Device {
            path: path.to_string(),
            vu,
            features: VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(),
            protocol: VhostUserProtocolFeatures::empty(),
            inflight: None,
            log: None,
            kicks: eventfds(),
            calls: eventfds(),
        };
        device.vu.set_owner()?;
        device.features &= device.vu.get_features()?;
        device.protocol = device.vu.get_protocol_features()?
            & (VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::INFLIGHT_SHMFD
                | VhostUserProtocolFeatures::LOG_SHMFD);
        device.agree()?;
        Ok(device)
    }

    fn agree(&mut self) -> Result<()> {
        self.vu.set_protocol_features(self.protocol)?;
        self.vu.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        Ok(())
    }

    /// Blocks of a page that the disk has.
    pub fn blocks(&mut self) -> Result<usize> {
        let flags = VhostUserConfigFlags::empty();
        let (_, config) = self.vu.get_config(0, 60, flags, &[0; 60])?;
        let sectors = u64::from_le_bytes(config[..8].try_into().unwrap());
        Ok(sectors as usize * 512 / PAGE)
    }

    pub fn set_up(&mut self, memory: &Memory, queues: &[Queue]) -> Result<()> {
        self.vu.set_features(self.features)?;
        self.vu.set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: memory.size as u64,
            userspace_addr: memory.user_address(0),
            mmap_offset: 0,
            mmap_handle: memory.file.as_raw_fd(),
        }])?;
        for index in 0..queues.len() {
            self.vu.set_vring_num(index, SIZE)?;
        }
        self.set_inflight(queues.len())?;
        for (index, queue) in queues.iter().enumerate() {
            self.set_addresses(memory, index, queue, false)?;
            // Whatever is not done is behind it.
            self.vu.set_vring_base(index, memory.index(queue.driver_area() + 2))?;
            self.vu.set_vring_call(index, &self.calls[index])?;
            self.vu.set_vring_kick(index, &self.kicks[index])?;
        }
        self.enable(true)
    }

    fn set_inflight(&mut self, queues: usize) -> Result<()> {
        if !self.protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            return Ok(());
        }
        if self.inflight.is_none() {
            let wanted = VhostUserInflight {
                num_queues: queues as u16,
                queue_size: SIZE,
                ..Default::default()
            };
            self.inflight = Some(self.vu.get_inflight_fd(&wanted)?);
        }
        let (info, file) = self.inflight.as_ref().unwrap();
        self.vu.set_inflight_fd(info, file.as_raw_fd())
    }

    fn set_addresses(&self, memory: &Memory, i: usize, queue: &Queue, log: bool) -> Result<()> {
        let data = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: if log { VRING_LOG } else { 0 },
            desc_table_addr: memory.user_address(queue.at),
            used_ring_addr: memory.user_address(queue.device_area()),
            avail_ring_addr: memory.user_address(queue.driver_area()),
            log_addr: log.then_some(queue.device_area() as u64),
        };
        self.vu.set_vring_addr(i, &data)
    }

    /// Pause or resume the device.
    pub fn enable(&mut self, enabled: bool) -> Result<()> {
        for index in 0..self.kicks.len() {
            self.vu.set_vring_enable(index, enabled)?;
        }
        Ok(())
    }

    /// Take the vrings down one by one, for a driver that resets the device.
    pub fn reset(&mut self) -> Result<()> {
        for index in 0..self.kicks.len() {
            self.vu.set_vring_enable(index, false)?;
            self.vu.get_vring_base(index)?;
        }
        Ok(())
    }

    pub fn log(&mut self, memory: &Memory, queues: &[Queue], on: bool) -> Result<()> {
        if on {
            self.swap_log(memory)?;
            self.vu.set_features(self.features | LOG_ALL)?;
        }
        for (index, queue) in queues.iter().enumerate() {
            self.set_addresses(memory, index, queue, on)?;
        }
        if !on {
            self.vu.set_features(self.features)?;
            self.log = None;
        }
        Ok(())
    }

    /// The pages that were written since the last time: those of a log that is not used any more.
    pub fn swap_log(&mut self, memory: &Memory) -> Result<Vec<usize>> {
        let log = Log::new(memory);
        self.set_log_base(&log);
        Ok(self.log.replace(log).map_or(Vec::new(), |old| old.pages()))
    }

    /// As the library does it since its version 0.16, which cloud-hypervisor has and Debian not:
    /// the reply is the description of the log, and it waits for the whole of it.
    fn set_log_base(&self, log: &Log) {
        let mut message = [6_u32, 0x9, 16].map(u32::to_ne_bytes).concat();
        message.extend((log.size as u64).to_ne_bytes());
        message.extend([0; 8]);
        let stream = unsafe { UnixStream::from_raw_fd(self.vu.as_raw_fd()) };
        let mut stream = ManuallyDrop::new(stream);
        stream.send_with_fd(&message[..], log.file.as_raw_fd()).expect("SET_LOG_BASE");
        message[4] = 0x5;
        let mut reply = [0; 28];
        stream.read_exact(&mut reply).expect("SET_LOG_BASE");
        assert_eq!(reply[..], message[..]);
    }

    /// Connect anew, with the requests in flight that the buffer tells of. What fails once there
    /// was a connection is not tried again.
    pub fn reconnect(&mut self, memory: &Memory, queues: &[Queue]) -> Result<()> {
        self.vu = connected(&self.path, queues.len());
        self.vu.set_owner()?;
        self.vu.get_features()?;
        self.vu.get_protocol_features()?;
        self.agree()?;
        self.set_up(memory, queues)
    }

    pub fn socket(&self) -> RawFd {
        self.vu.as_raw_fd()
    }
}

fn connected(path: &str, queues: usize) -> Frontend {
    let began = Instant::now();
    loop {
        match Frontend::connect(path, queues as u64) {
            Ok(vu) => return vu,
            Err(error) if began.elapsed() > PATIENCE => panic!("{path}: {error}"),
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}
