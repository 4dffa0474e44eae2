//! How a dataplane shares the kernel with other programs.

/// Settings of every backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Bits of the connection mark that belong to Hanse: contiguous, at least 8.
    pub ct_mark_mask: u32,
    /// Bits of the packet mark that Hanse uses while it judges a packet, and zeroes afterwards: contiguous, at least 2.
    pub packet_mark_mask: u32,
    pub uplinks: Uplinks,
}

/// Interfaces that lead out of the node. They may bring packets from any source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Uplinks {
    /// Those with a route to more than one address outside of the node's pod ranges.
    Detected,
    Named(Vec<String>),
}

impl Default for Settings {
    fn default() -> Self {
        Self { ct_mark_mask: 0xffff_0000, packet_mark_mask: 0x0030_0000, uplinks: Uplinks::Detected }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    #[error("the connection mark mask {0:#x} must have at least 8 contiguous bits")]
    CtMask(u32),
    #[error("the packet mark mask {0:#x} must have at least 2 contiguous bits")]
    PacketMask(u32),
    #[error("\"{0}\" is not an interface name of 1 to 15 bytes")]
    Interface(String),
}

impl Settings {
    /// # Errors
    /// When a value is out of range.
    pub fn check(&self) -> Result<(), SettingsError> {
        if !is_contiguous(self.ct_mark_mask, 8) {
            return Err(SettingsError::CtMask(self.ct_mark_mask));
        }
        if !is_contiguous(self.packet_mark_mask, 2) {
            return Err(SettingsError::PacketMask(self.packet_mark_mask));
        }
        let Uplinks::Named(names) = &self.uplinks else { return Ok(()) };
        match names.iter().find(|name| name.is_empty() || name.len() > 15) {
            Some(name) => Err(SettingsError::Interface(name.clone())),
            None => Ok(()),
        }
    }
}

fn is_contiguous(mask: u32, bits: u32) -> bool {
    mask.count_ones() >= bits && mask.count_ones() + mask.trailing_zeros() + mask.leading_zeros() == u32::BITS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_masks_with_gaps_and_masks_that_are_too_small() {
        let check =
            |ct_mark_mask, packet_mark_mask| Settings { ct_mark_mask, packet_mark_mask, ..Settings::default() }.check();
        assert_eq!(check(0xffff_0000, 0x0030_0000), Ok(()));
        assert_eq!(check(0xff, 0xffff_ffff), Ok(()));
        for mask in [0, 0x7f, 0xff00_00ff, 0x0001_01fe] {
            assert_eq!(check(mask, 3), Err(SettingsError::CtMask(mask)), "{mask:#x}");
        }
        for mask in [0, 1, 0b101] {
            assert_eq!(check(0xff, mask), Err(SettingsError::PacketMask(mask)), "{mask:#x}");
        }
    }
}
