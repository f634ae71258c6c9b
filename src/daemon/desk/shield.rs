//! The shield as the settings and the defence level want it.

use std::collections::HashSet;

use super::Desk;
use crate::daemon::ShieldMode;
use crate::daemon::log::line;
use crate::error::Result;
use crate::reconcile::pressure::Level;
use crate::shield::{Program, Shield};

impl<'p> Desk<'p> {
    /// Keeps from conntrack what would fool it, before the first look at what it knows; by itself
    /// only where the defence level says so.
    pub(in crate::daemon) fn open_shield(
        &mut self,
        program: &'p mut Program,
        ports: &HashSet<u16>,
        level: Level,
    ) -> Result<()> {
        let mark = self.foundation.shield_mark;
        self.shield_is_wanted = self.foundation.shield == ShieldMode::On || level > Level::Calm;
        let is_wanted = self.shield_is_wanted;
        let opened = Shield::open(program, &self.foundation.device, mark, ports);
        let raised = opened.and_then(|mut shield| {
            if is_wanted {
                shield.raise()?;
            }
            Ok(shield)
        });
        match raised {
            Ok(shield) if is_wanted => {
                tracing::info!(devices = shield.devices(), mark, "shield raised");
                self.shield = Some(shield);
            }
            Ok(shield) => {
                tracing::info!(mark, "shield ready, to be raised with the defence level");
                self.shield = Some(shield);
            }
            Err(error) if self.foundation.shield == ShieldMode::On => return Err(error),
            Err(error) => tracing::warn!(%error, "no shield, repairs go on without it"),
        }
        Ok(())
    }

    /// Raises the shield with the defence level, and lowers it with that, where it goes by itself.
    pub(in crate::daemon) fn follow_level(&mut self, level: Level) {
        if self.foundation.shield != ShieldMode::Auto {
            return;
        }
        self.shield_is_wanted = level > Level::Calm;
        let Some(is_up) = self.shield.as_ref().map(Shield::is_up) else { return };
        if self.shield_is_wanted && !is_up {
            self.update_shield(|shield| {
                shield.raise()?;
                tracing::info!(devices = shield.devices(), "shield raised");
                Ok(())
            });
        } else if is_up && !self.shield_is_wanted {
            self.update_shield(|shield| {
                shield.lower();
                tracing::info!("shield lowered");
                Ok(())
            });
        }
    }

    /// What fails about the shield is tried again, and never stands in the way of a repair.
    pub(in crate::daemon) fn update_shield(
        &mut self,
        update: impl FnOnce(&mut Shield<'p>) -> Result<()>,
    ) {
        if let Some(Err(error)) = self.shield.as_mut().map(update) {
            line!(
                self.lines.fits("shield"),
                warn,
                %error,
                "shield does not follow, will be tried again"
            );
        }
    }

    /// Publishes what the shield has decided, and whether it is missing where it can be raised.
    pub(in crate::daemon) fn publish_shield(&self, can_be_raised: bool) {
        let is_wanted = can_be_raised
            && match self.foundation.shield {
                ShieldMode::Off => false,
                // One that could not even be made ready is missing in peace, too.
                ShieldMode::Auto => self.shield_is_wanted || self.shield.is_none(),
                ShieldMode::On => true,
            };
        let is_whole = self.shield.as_ref().is_some_and(|it| it.is_up() && !it.is_refused());
        self.share.shield_missing(is_wanted && !is_whole);
        match self.shield.as_ref().map(|shield| (shield.devices(), shield.counts())) {
            Some((devices, Ok(counts))) => self.share.shield(devices, counts),
            Some((_, Err(error))) => tracing::debug!(%error, "counters stay as they were"),
            None => {}
        }
    }
}
