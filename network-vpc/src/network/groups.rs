//! Security groups of a network.

use std::collections::BTreeMap;

use ami_core::{SecurityGroupId, SecurityGroupRuleId, VpcId};

use super::{Network, no_random};
use crate::firewall::{Direction, Peer};
use crate::model::Model;
use crate::{Error, ErrorKind, Result, Rule, SecurityGroup};

/// The name of the group that every VPC has.
pub(super) const DEFAULT: &str = "default";

/// The most rules of a group each way, and the most groups of an interface (VPC User Guide, "Amazon VPC quotas").
const MOST_RULES: usize = 60;
const MOST_GROUPS: usize = 5;

/// The longest name and description.
const LONGEST_TEXT: usize = 255;

impl Network {
    /// The security groups.
    pub fn security_groups(&self) -> Vec<SecurityGroup> {
        self.model().groups.values().cloned().collect()
    }

    /// A security group.
    ///
    /// # Errors
    ///
    /// [`GroupNotFound`](ErrorKind::GroupNotFound).
    pub fn security_group(&self, id: SecurityGroupId) -> Result<SecurityGroup> {
        self.model().group(id).cloned()
    }

    /// Makes a group, which lets everything out and nothing in.
    ///
    /// # Errors
    ///
    /// [`VpcNotFound`](ErrorKind::VpcNotFound), [`GroupDuplicate`](ErrorKind::GroupDuplicate),
    /// [`InvalidParameter`](ErrorKind::InvalidParameter) for a name or description that cannot be one, or what the
    /// host refused.
    pub fn create_security_group(&self, vpc: VpcId, name: &str, description: &str) -> Result<SecurityGroup> {
        let valid = !name.is_empty() && !name.starts_with("sg-") && name != DEFAULT;
        if !valid || name.len() > LONGEST_TEXT || description.len() > LONGEST_TEXT {
            let what = format!("{name:?} cannot be a group's name, or its description is too long");
            return Err(Error::new(ErrorKind::InvalidParameter, what));
        }
        let group = new_group(vpc, name, description)?;
        self.change(|model| {
            model.vpc(vpc)?;
            if model.groups.values().any(|there| there.vpc_id == vpc && there.name == name) {
                return Err(Error::new(ErrorKind::GroupDuplicate, format!("{vpc} has a group {name:?}")));
            }
            model.groups.insert(group.id, group.clone());
            Ok(group)
        })
    }

    /// Deletes a group that no interface is in, no rule of another names, and that is no VPC's default one.
    ///
    /// # Errors
    ///
    /// [`GroupNotFound`](ErrorKind::GroupNotFound), [`DependencyViolation`](ErrorKind::DependencyViolation), or what
    /// the host refused.
    pub fn delete_security_group(&self, id: SecurityGroupId) -> Result<()> {
        self.change(|model| {
            let is_default = model.group(id)?.name == DEFAULT;
            let has_members = model.interfaces.values().any(|interface| interface.groups.contains(&id));
            let is_named = model.groups.values().filter(|group| group.id != id).any(|group| {
                group.ingress.values().chain(group.egress.values()).any(|rule| rule.peer == Peer::Group(id))
            });
            if is_default || has_members || is_named {
                return Err(Error::new(ErrorKind::DependencyViolation, format!("{id} is needed")));
            }
            model.groups.remove(&id);
            Ok(())
        })
    }

    /// Adds a rule to a group, in force when this returns: for the conversations that begin from now on.
    ///
    /// # Errors
    ///
    /// [`GroupNotFound`](ErrorKind::GroupNotFound), also for the rule's peer,
    /// [`InvalidPermission`](ErrorKind::InvalidPermission),
    /// [`PermissionDuplicate`](ErrorKind::PermissionDuplicate), [`RulesLimit`](ErrorKind::RulesLimit), or what the
    /// host refused.
    pub fn authorize(
        &self,
        id: SecurityGroupId,
        direction: Direction,
        rule: Rule,
    ) -> Result<SecurityGroupRuleId> {
        rule.check()?;
        let rule_id = SecurityGroupRuleId::random().map_err(no_random)?;
        self.change(|model| {
            let vpc = model.group(id)?.vpc_id;
            if let Peer::Group(peer) = rule.peer {
                if model.group(peer)?.vpc_id != vpc {
                    return Err(Error::new(ErrorKind::GroupNotFound, format!("{peer} is not in {vpc}")));
                }
            }
            let rules = rules(model, id, direction)?;
            if rules.values().any(|there| there.is_same(&rule)) {
                let what = format!("{id} has a rule that allows the same");
                return Err(Error::new(ErrorKind::PermissionDuplicate, what));
            }
            if rules.len() >= MOST_RULES {
                let what = format!("{id} has {MOST_RULES} rules, which is the most");
                return Err(Error::new(ErrorKind::RulesLimit, what));
            }
            rules.insert(rule_id, rule);
            Ok(rule_id)
        })
    }

    /// Takes a rule back, by its id. Conversations that it allowed go on, unless they needed no tracking: those of a rule
    /// for everybody, where everything may go the other way.
    ///
    /// # Errors
    ///
    /// [`GroupNotFound`](ErrorKind::GroupNotFound), [`PermissionNotFound`](ErrorKind::PermissionNotFound), or what
    /// the host refused.
    pub fn revoke(&self, id: SecurityGroupId, rule: SecurityGroupRuleId) -> Result<()> {
        self.change(|model| {
            for direction in [Direction::Ingress, Direction::Egress] {
                if rules(model, id, direction)?.remove(&rule).is_some() {
                    return Ok(());
                }
            }
            Err(Error::new(ErrorKind::PermissionNotFound, format!("{id} has no rule {rule}")))
        })
    }
}

fn rules(
    model: &mut Model,
    id: SecurityGroupId,
    direction: Direction,
) -> Result<&mut BTreeMap<SecurityGroupRuleId, Rule>> {
    model.group(id)?;
    let group = model.groups.get_mut(&id);
    let group = group.ok_or_else(|| Error::new(ErrorKind::GroupNotFound, format!("there is no {id}")))?;
    Ok(match direction {
        Direction::Ingress => &mut group.ingress,
        Direction::Egress => &mut group.egress,
    })
}

/// The groups that an interface is to be in, all of its VPC.
pub(super) fn of_interface(
    model: &Model,
    vpc: VpcId,
    groups: Vec<SecurityGroupId>,
) -> Result<Vec<SecurityGroupId>> {
    if groups.is_empty() {
        let default = model.groups.values().find(|group| group.vpc_id == vpc && group.name == DEFAULT);
        return Ok(default.map(|group| group.id).into_iter().collect());
    }
    if groups.len() > MOST_GROUPS {
        let what = format!("an interface is in {MOST_GROUPS} groups at most");
        return Err(Error::new(ErrorKind::InvalidParameter, what));
    }
    for id in &groups {
        if model.group(*id)?.vpc_id != vpc {
            return Err(Error::new(ErrorKind::GroupNotFound, format!("{id} is not in {vpc}")));
        }
    }
    Ok(groups)
}

/// The group that a VPC has from the beginning: its members talk to each other.
pub(super) fn default_group(vpc: VpcId) -> Result<SecurityGroup> {
    let mut group = new_group(vpc, DEFAULT, "default VPC security group")?;
    let rule = SecurityGroupRuleId::random().map_err(no_random)?;
    group.ingress.insert(rule, Rule::all(Peer::Group(group.id)));
    Ok(group)
}

fn new_group(vpc: VpcId, name: &str, description: &str) -> Result<SecurityGroup> {
    let id = SecurityGroupId::random().map_err(no_random)?;
    let rule = SecurityGroupRuleId::random().map_err(no_random)?;
    let everything = Rule::all(Peer::Cidr(ipnet::Ipv4Net::default()));
    Ok(SecurityGroup {
        id,
        name: name.to_owned(),
        description: description.to_owned(),
        vpc_id: vpc,
        ingress: BTreeMap::new(),
        egress: BTreeMap::from([(rule, everything)]),
    })
}
