//! The CUDA runtime library, loaded at run time: memory, copies, streams and events.

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    ptr,
    sync::Arc,
};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::device::DeviceError;

/// File name of the library; ONNX Runtime's provider is linked against the same file.
const NAME: &str = "libcudart.so.13";
/// `cudaErrorMemoryAllocation`.
const OUT_OF_MEMORY: c_int = 2;
/// `cudaMemcpyDefault`: the direction follows from the addresses.
const COPY_DEFAULT: c_int = 4;
/// `cudaStreamNonBlocking`.
const NON_BLOCKING: c_uint = 1;
/// `cudaDevAttrComputeCapabilityMajor` and `cudaDevAttrComputeCapabilityMinor`.
const CAPABILITY: [c_int; 2] = [75, 76];

type Handle = *mut c_void;

/// Functions of the library. All return `cudaError_t`, which is 0 for success.
struct Functions {
    device_count: unsafe extern "C" fn(*mut c_int) -> c_int,
    set_device: unsafe extern "C" fn(c_int) -> c_int,
    attribute: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int,
    error_text: unsafe extern "C" fn(c_int) -> *const c_char,
    last_error: unsafe extern "C" fn() -> c_int,
    malloc: unsafe extern "C" fn(*mut Handle, usize) -> c_int,
    free: unsafe extern "C" fn(Handle) -> c_int,
    host_malloc: unsafe extern "C" fn(*mut Handle, usize, c_uint) -> c_int,
    host_free: unsafe extern "C" fn(Handle) -> c_int,
    copy: unsafe extern "C" fn(Handle, *const c_void, usize, c_int, Handle) -> c_int,
    copy_rows: unsafe extern "C" fn(Handle, usize, *const c_void, usize, usize, usize, c_int, Handle) -> c_int,
    fill: unsafe extern "C" fn(Handle, c_int, usize, Handle) -> c_int,
    stream_create: unsafe extern "C" fn(*mut Handle, c_uint) -> c_int,
    stream_wait: unsafe extern "C" fn(Handle) -> c_int,
    event_create: unsafe extern "C" fn(*mut Handle, c_uint) -> c_int,
    event_record: unsafe extern "C" fn(Handle, Handle) -> c_int,
    event_wait: unsafe extern "C" fn(Handle) -> c_int,
    event_elapsed: unsafe extern "C" fn(*mut f32, Handle, Handle) -> c_int,
}

/// The loaded library with a usable device. Streams and events live as long as the process: an engine makes a handful.
pub(super) struct Runtime {
    call: Functions,
    /// Compute capability of the device, like `9.0`.
    pub(super) capability: (i32, i32),
    _library: Library,
}

impl std::fmt::Debug for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runtime")
            .field("capability", &self.capability)
            .finish_non_exhaustive()
    }
}

fn unavailable(detail: String) -> DeviceError {
    DeviceError::Provider {
        provider: "cuda",
        detail,
    }
}

impl Runtime {
    /// Loads the library, checks that there is a device, and selects the first one.
    ///
    /// # Errors
    /// The library or a device is missing.
    #[expect(
        unsafe_code,
        reason = "functions of a C library can only be loaded and called by unsafe code"
    )]
    pub(super) fn load() -> Result<Arc<Self>, DeviceError> {
        // SAFETY: the library's initializers only set up its own state; it is never unloaded while a function is in use
        let library = unsafe { Library::open(Some(NAME), RTLD_NOW | RTLD_GLOBAL) };
        let library = library.map_err(|e| {
            unavailable(format!(
                "the CUDA runtime {NAME} is not usable ({e}): put the folder of CUDA 13's libraries into LD_LIBRARY_PATH"
            ))
        })?;
        macro_rules! function {
            ($name:literal) => {{
                // SAFETY: the types are those of cuda_runtime_api.h, the same in CUDA 12 and 13
                let symbol = unsafe { library.get(concat!($name, "\0").as_bytes()) };
                *symbol.map_err(|e| unavailable(format!("the CUDA runtime lacks `{}`: {e}", $name)))?
            }};
        }
        let call = Functions {
            device_count: function!("cudaGetDeviceCount"),
            set_device: function!("cudaSetDevice"),
            attribute: function!("cudaDeviceGetAttribute"),
            error_text: function!("cudaGetErrorString"),
            last_error: function!("cudaGetLastError"),
            malloc: function!("cudaMalloc"),
            free: function!("cudaFree"),
            host_malloc: function!("cudaHostAlloc"),
            host_free: function!("cudaFreeHost"),
            copy: function!("cudaMemcpyAsync"),
            copy_rows: function!("cudaMemcpy2DAsync"),
            fill: function!("cudaMemsetAsync"),
            stream_create: function!("cudaStreamCreateWithFlags"),
            stream_wait: function!("cudaStreamSynchronize"),
            event_create: function!("cudaEventCreateWithFlags"),
            event_record: function!("cudaEventRecord"),
            event_wait: function!("cudaEventSynchronize"),
            event_elapsed: function!("cudaEventElapsedTime"),
        };
        let mut runtime = Self {
            call,
            capability: (0, 0),
            _library: library,
        };
        let mut devices = 0;
        // SAFETY: `devices` outlives the call
        let code = unsafe { (runtime.call.device_count)(&raw mut devices) };
        if code != 0 || devices == 0 {
            return Err(unavailable(if code == 0 {
                "no CUDA device is found".to_owned()
            } else {
                format!("no CUDA device is found: {}", runtime.text(code))
            }));
        }
        runtime.select()?;
        let attribute = |which: c_int| {
            let mut value = 0;
            // SAFETY: `value` outlives the call
            let code = unsafe { (runtime.call.attribute)(&raw mut value, which, 0) };
            runtime.check("reading the compute capability", code).map(|()| value)
        };
        runtime.capability = (attribute(CAPABILITY[0])?, attribute(CAPABILITY[1])?);
        Ok(Arc::new(runtime))
    }

    /// Selects the device for the calling thread.
    ///
    /// # Errors
    /// The device is not usable.
    #[expect(unsafe_code, reason = "a call into a C library")]
    pub(super) fn select(&self) -> Result<(), DeviceError> {
        // SAFETY: the function takes a number
        self.check("selecting the device", unsafe { (self.call.set_device)(0) })
    }

    #[expect(unsafe_code, reason = "a call into a C library")]
    fn text(&self, code: c_int) -> String {
        // SAFETY: the function takes any number
        let text = unsafe { (self.call.error_text)(code) };
        if text.is_null() {
            return format!("CUDA error {code}");
        }
        // SAFETY: the text is static and ends with a zero byte
        let text = unsafe { CStr::from_ptr(text) };
        format!("{} (CUDA error {code})", text.to_string_lossy())
    }

    #[expect(unsafe_code, reason = "a call into a C library")]
    fn check(&self, what: &'static str, code: c_int) -> Result<(), DeviceError> {
        if code == 0 {
            return Ok(());
        }
        // the library remembers the error for the next caller that asks, which would be ONNX Runtime
        // SAFETY: the function takes nothing
        let _remembered = unsafe { (self.call.last_error)() };
        Err(DeviceError::Cuda {
            what,
            detail: self.text(code),
        })
    }
}

/// Allocated memory, on the device or page-locked on the host.
pub(super) struct Memory {
    runtime: Arc<Runtime>,
    address: Handle,
    bytes: usize,
    host: bool,
}

// SAFETY: an allocation belongs to no thread; whoever holds it orders the accesses by streams
#[expect(unsafe_code, reason = "an address is not `Send` by itself")]
unsafe impl Send for Memory {}
// SAFETY: a shared reference only gives out addresses
#[expect(unsafe_code, reason = "an address is not `Sync` by itself")]
unsafe impl Sync for Memory {}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory")
            .field("bytes", &self.bytes)
            .field("host", &self.host)
            .finish_non_exhaustive()
    }
}

/// Range of allocated memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Range {
    address: Handle,
    pub(super) bytes: usize,
}

// SAFETY: as for `Memory`; whoever keeps a range keeps its memory
#[expect(unsafe_code, reason = "an address is not `Send` by itself")]
unsafe impl Send for Range {}

impl Range {
    /// Returns the address for another library.
    pub(super) fn address(self) -> *mut c_void {
        self.address
    }

    /// Returns `bytes` bytes from `offset`.
    ///
    /// # Errors
    /// The range is shorter.
    pub(super) fn part(self, offset: usize, bytes: usize) -> Result<Self, DeviceError> {
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            return Err(DeviceError::Cuda {
                what: "addressing device memory",
                detail: format!("bytes {offset} to {offset} + {bytes} of {}", self.bytes),
            });
        }
        Ok(Self {
            address: self.address.wrapping_byte_add(offset),
            bytes,
        })
    }
}

impl Memory {
    #[expect(unsafe_code, reason = "a call into a C library")]
    fn allocate(runtime: &Arc<Runtime>, bytes: usize, host: bool, what: &'static str) -> Result<Self, DeviceError> {
        let mut address = ptr::null_mut();
        let bytes = bytes.max(1);
        let code = if host {
            // SAFETY: `address` outlives the call
            unsafe { (runtime.call.host_malloc)(&raw mut address, bytes, 0) }
        } else {
            // SAFETY: `address` outlives the call
            unsafe { (runtime.call.malloc)(&raw mut address, bytes) }
        };
        if let Err(error) = runtime.check("allocating memory", code) {
            return Err(match code {
                OUT_OF_MEMORY => DeviceError::Memory { what, bytes },
                _ => error,
            });
        }
        Ok(Self {
            runtime: Arc::clone(runtime),
            address,
            bytes,
            host,
        })
    }

    /// Allocates memory of the device, filled with zeros in the order of `stream`.
    ///
    /// # Errors
    /// The device has not enough memory.
    pub(super) fn device(stream: &Stream, bytes: usize, what: &'static str) -> Result<Self, DeviceError> {
        let runtime = &stream.runtime;
        let memory = Self::allocate(runtime, bytes, false, what)?;
        stream.zero(memory.range())?;
        Ok(memory)
    }

    /// Allocates page-locked memory of the host, filled with zeros.
    ///
    /// # Errors
    /// The host has not enough memory.
    pub(super) fn host(runtime: &Arc<Runtime>, bytes: usize, what: &'static str) -> Result<Pinned, DeviceError> {
        let mut pinned = Pinned(Self::allocate(runtime, bytes, true, what)?);
        pinned.bytes_mut().fill(0);
        Ok(pinned)
    }

    /// Returns the whole range.
    pub(super) fn range(&self) -> Range {
        Range {
            address: self.address,
            bytes: self.bytes,
        }
    }
}

impl Drop for Memory {
    #[expect(unsafe_code, reason = "a call into a C library")]
    fn drop(&mut self) {
        let free = if self.host {
            self.runtime.call.host_free
        } else {
            self.runtime.call.free
        };
        // SAFETY: the address is of this allocation, which is freed once; an error at this place leaves nothing to do
        let _ignored = unsafe { free(self.address) };
    }
}

/// Page-locked memory of the host, from and to which copies run while the caller continues.
#[derive(Debug)]
pub(super) struct Pinned(Memory);

impl Pinned {
    /// Returns the bytes for writing. The caller has waited for earlier copies from or to this memory.
    #[expect(unsafe_code, reason = "the memory is of a C library")]
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the allocation has this length, and the exclusive reference excludes other references
        unsafe { std::slice::from_raw_parts_mut(self.0.address.cast(), self.0.bytes) }
    }

    /// Returns the bytes for reading. The caller has waited for earlier copies to this memory.
    #[expect(unsafe_code, reason = "the memory is of a C library")]
    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: the allocation has this length and was filled when it was made
        unsafe { std::slice::from_raw_parts(self.0.address.cast::<u8>(), self.0.bytes) }
    }

    /// Returns the whole range.
    pub(super) fn range(&self) -> Range {
        self.0.range()
    }
}

/// Order of operations on the device.
#[derive(Debug)]
pub(super) struct Stream {
    runtime: Arc<Runtime>,
    handle: Handle,
}

// SAFETY: streams may be used from any thread
#[expect(unsafe_code, reason = "a handle is not `Send` by itself")]
unsafe impl Send for Stream {}
// SAFETY: the library locks its streams
#[expect(unsafe_code, reason = "a handle is not `Sync` by itself")]
unsafe impl Sync for Stream {}

impl Stream {
    /// Creates a stream, which lives as long as the process: sessions of ONNX Runtime keep its handle.
    ///
    /// # Errors
    /// The library fails.
    #[expect(unsafe_code, reason = "a call into a C library")]
    pub(super) fn new(runtime: &Arc<Runtime>) -> Result<Self, DeviceError> {
        let mut handle = ptr::null_mut();
        // SAFETY: `handle` outlives the call
        let code = unsafe { (runtime.call.stream_create)(&raw mut handle, NON_BLOCKING) };
        runtime.check("creating a stream", code)?;
        Ok(Self {
            runtime: Arc::clone(runtime),
            handle,
        })
    }

    /// Returns the handle for another library.
    pub(super) fn handle(&self) -> *mut c_void {
        self.handle
    }

    /// Returns the library.
    pub(super) fn runtime(&self) -> &Arc<Runtime> {
        &self.runtime
    }

    /// Fills a range with zeros.
    ///
    /// # Errors
    /// The library fails.
    #[expect(unsafe_code, reason = "a call into a C library")]
    pub(super) fn zero(&self, range: Range) -> Result<(), DeviceError> {
        // SAFETY: the range is allocated
        let code = unsafe { (self.runtime.call.fill)(range.address, 0, range.bytes, self.handle) };
        self.runtime.check("filling memory", code)
    }

    /// Copies all bytes of `from` to the start of `to`. The copy runs in the order of the stream; both ranges must live, and host
    /// memory must not change, until the stream has been waited for.
    ///
    /// # Errors
    /// `to` is shorter, or the library fails.
    #[expect(unsafe_code, reason = "a call into a C library")]
    pub(super) fn copy(&self, to: Range, from: Range) -> Result<(), DeviceError> {
        let to = to.part(0, from.bytes)?;
        // SAFETY: both ranges have this length and are allocated (`Range` is made from allocations only)
        let code = unsafe { (self.runtime.call.copy)(to.address, from.address, from.bytes, COPY_DEFAULT, self.handle) };
        self.runtime.check("copying memory", code)
    }

    /// Copies `rows` rows of `bytes` bytes each, whose starts are `pitch` bytes apart.
    ///
    /// # Errors
    /// A range is shorter, or the library fails.
    #[expect(unsafe_code, reason = "a call into a C library")]
    pub(super) fn copy_rows(
        &self,
        (to, to_pitch): (Range, usize),
        (from, from_pitch): (Range, usize),
        bytes: usize,
        rows: usize,
    ) -> Result<(), DeviceError> {
        let last = rows.saturating_sub(1);
        let to = to.part(0, last * to_pitch + bytes)?;
        let from = from.part(0, last * from_pitch + bytes)?;
        // SAFETY: both ranges hold all rows
        let code = unsafe {
            (self.runtime.call.copy_rows)(
                to.address,
                to_pitch,
                from.address,
                from_pitch,
                bytes,
                rows,
                COPY_DEFAULT,
                self.handle,
            )
        };
        self.runtime.check("copying rows of memory", code)
    }

    /// Waits for all operations of the stream.
    ///
    /// # Errors
    /// An operation of the stream failed.
    #[expect(unsafe_code, reason = "a call into a C library")]
    pub(super) fn wait(&self) -> Result<(), DeviceError> {
        // SAFETY: the handle is a stream
        let code = unsafe { (self.runtime.call.stream_wait)(self.handle) };
        self.runtime.check("waiting for the device", code)
    }
}

/// Point in a stream.
#[derive(Debug)]
pub(super) struct Event {
    runtime: Arc<Runtime>,
    handle: Handle,
}

// SAFETY: events may be used from any thread
#[expect(unsafe_code, reason = "a handle is not `Send` by itself")]
unsafe impl Send for Event {}

impl Event {
    /// Creates an event, which lives as long as the process.
    ///
    /// # Errors
    /// The library fails.
    #[expect(unsafe_code, reason = "a call into a C library")]
    pub(super) fn new(runtime: &Arc<Runtime>) -> Result<Self, DeviceError> {
        let mut handle = ptr::null_mut();
        // SAFETY: `handle` outlives the call
        let code = unsafe { (runtime.call.event_create)(&raw mut handle, 0) };
        runtime.check("creating an event", code)?;
        Ok(Self {
            runtime: Arc::clone(runtime),
            handle,
        })
    }

    /// Puts the event behind all operations of the stream so far.
    ///
    /// # Errors
    /// The library fails.
    #[expect(unsafe_code, reason = "a call into a C library")]
    pub(super) fn record(&self, stream: &Stream) -> Result<(), DeviceError> {
        // SAFETY: both handles are of the library
        let code = unsafe { (self.runtime.call.event_record)(self.handle, stream.handle) };
        self.runtime.check("recording an event", code)
    }

    /// Waits for the event; returns at once when it was never recorded.
    ///
    /// # Errors
    /// An earlier operation failed.
    #[expect(unsafe_code, reason = "a call into a C library")]
    pub(super) fn wait(&self) -> Result<(), DeviceError> {
        // SAFETY: the handle is an event
        let code = unsafe { (self.runtime.call.event_wait)(self.handle) };
        self.runtime.check("waiting for an event", code)
    }

    /// Returns the seconds on the device from `start` to this event; both have been waited for.
    ///
    /// # Errors
    /// The library fails.
    #[expect(unsafe_code, reason = "a call into a C library")]
    pub(super) fn seconds_since(&self, start: &Self) -> Result<f64, DeviceError> {
        let mut milliseconds = 0.0f32;
        // SAFETY: `milliseconds` outlives the call, both handles are events
        let code = unsafe { (self.runtime.call.event_elapsed)(&raw mut milliseconds, start.handle, self.handle) };
        self.runtime.check("reading an event", code)?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}
