//! Where the ports of a network are.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, PoisonError, RwLock};

use ami_core::VpcId;

use crate::port::Port;
use crate::switch::View;

/// All ports of a network, by where they are.
#[derive(Debug, Default)]
pub(crate) struct Fabric {
    ports: RwLock<HashMap<(VpcId, Ipv4Addr), Arc<Port>>>,
}

impl Fabric {
    pub(crate) fn find(&self, vpc: VpcId, address: Ipv4Addr) -> Option<Arc<Port>> {
        self.ports.read().unwrap_or_else(PoisonError::into_inner).get(&(vpc, address)).cloned()
    }

    pub(crate) fn add(&self, port: &Arc<Port>) {
        let view = port.view();
        let mut ports = self.ports.write().unwrap_or_else(PoisonError::into_inner);
        ports.extend(view.addresses().map(|address| ((view.vpc, address), port.clone())));
    }

    /// Tells a port what is known of its interface now, which may have other addresses.
    pub(crate) fn renew(&self, port: &Arc<Port>, view: View) {
        let moved = !port.view().addresses().eq(view.addresses());
        if moved {
            let is_there = self.remove(port);
            port.set_view(view);
            if is_there {
                self.add(port);
            }
        } else {
            port.set_view(view);
        }
    }

    /// Takes a port out, but for where another has its place by now. Says whether it was there.
    pub(crate) fn remove(&self, port: &Arc<Port>) -> bool {
        let view = port.view();
        let mut ports = self.ports.write().unwrap_or_else(PoisonError::into_inner);
        let mut was_there = false;
        for address in view.addresses() {
            let at = (view.vpc, address);
            if ports.get(&at).is_some_and(|there| Arc::ptr_eq(there, port)) {
                ports.remove(&at);
                was_there = true;
            }
        }
        was_there
    }
}
