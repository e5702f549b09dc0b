-- What online features need beside the registry: which epoch of a view is read, who was erased, and the durable copy of rows.

create table plait.view_epoch (
    tenant text not null,
    view text not null,
    version integer not null,
    serving integer not null default 0,
    building integer,
    previous integer,
    newest integer not null default 0,
    started_at timestamptz,
    flipped_at timestamptz,
    primary key (tenant, view, version),
    check (serving <> previous and serving <> building and building <> previous),
    check (newest >= greatest(serving, building, previous))
);
comment on column plait.view_epoch.newest is 'The highest epoch there ever was: a number is never given twice, because its rows may still lie about.';

create table plait.erasure (
    id bigserial primary key,
    tenant text not null,
    entity_type text not null,
    entity bytea not null,
    until_us bigint not null,
    erased_at timestamptz not null default now(),
    actor text not null,
    reason text not null
);
create index erasure_of on plait.erasure (tenant, entity_type, entity);
comment on table plait.erasure is 'Events of these entities up to until_us are refused for ever; entity is the typed id as in the key of a row.';

create table plait.feature_row (
    tenant text not null,
    entity_type text not null,
    entity bytea not null,
    view text not null,
    version integer not null,
    epoch integer not null,
    position bytea not null,
    value bytea not null,
    primary key (tenant, entity_type, entity, view, version, epoch)
);
comment on column plait.feature_row.position is
    'Event time (sign bit flipped) and sequence, big-endian, then 0 for a backfilled and 1 for a streamed row: compares as the store does.';
