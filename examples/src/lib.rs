//! Examples. The code in the READMEs is compiled here.

#[cfg(doctest)]
mod readmes {
    #[doc = include_str!("../../README.md")]
    struct Workspace;
    #[doc = include_str!("../../ami-core/README.md")]
    struct AmiCore;
    #[doc = include_str!("../../storage-block/README.md")]
    struct StorageBlock;
    #[doc = include_str!("../../image-formats/README.md")]
    struct ImageFormats;
    #[doc = include_str!("../../boot-image/README.md")]
    struct BootImage;
    #[doc = include_str!("../../instance-core/README.md")]
    struct InstanceCore;
    #[doc = include_str!("../../hypervisor-kvm/README.md")]
    struct HypervisorKvm;
    #[doc = include_str!("../../network-vpc/README.md")]
    struct NetworkVpc;
    #[doc = include_str!("../../hypervisor-qemu/README.md")]
    struct HypervisorQemu;
}
