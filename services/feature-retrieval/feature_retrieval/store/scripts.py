"""What Redis decides by itself, because nobody can decide it from outside without racing: newest wins, swap if unchanged, erase.

The keys of one call lie in one slot, and a call has at most about 64 of them, so that it never blocks Redis for long. 64-bit numbers are
compared as two 32-bit halves because Lua's numbers are doubles; bytes one by one because Lua's < follows a locale.
"""

from __future__ import annotations

from typing import Final

from plait.redis.script import Script

# KEYS: n rows, then the erasure marks of their entities. ARGV: time to live and longest extra, ms; a seed; n rows.
# Answers a digit per row: 0 older, 1 applied, 2 its entity was erased since. A row replaces another only if (event time, sequence, streamed
# before backfilled, bytes) is greater: any order and any repetition of writes ends the same. Of two rows of one time the streamed one stays,
# so that a later carry-over finds it.
WRITE: Final = Script(b"""
local ttl, jitter, seed = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local n = #KEYS / 2
local marks = redis.call('MGET', unpack(KEYS, n + 1))
local out = {}
for i = 1, n do
  local row = ARGV[i + 3]
  local tl, th = struct.unpack('<I4i4', row, 9)
  local verdict = '0'
  local mark = marks[i]
  if mark then
    local ml, mh = struct.unpack('<I4i4', mark)
    if th < mh or (th == mh and tl <= ml) then verdict = '2' end
  end
  if verdict ~= '2' then
    local old = redis.call('GETRANGE', KEYS[i], 0, 31)
    local newer = #old < 32
    if not newer then
      local ol, oh = struct.unpack('<I4i4', old, 9)
      if th ~= oh then newer = th > oh
      elseif tl ~= ol then newer = tl > ol
      else
        local sl, sh = struct.unpack('<I4I4', row, 25)
        local pl, ph = struct.unpack('<I4I4', old, 25)
        if sh ~= ph then newer = sh > ph
        elseif sl ~= pl then newer = sl > pl
        else
          local filled = math.floor(string.byte(row, 5) / 2) % 2
          local held = math.floor(string.byte(old, 5) / 2) % 2
          if filled ~= held then newer = filled < held
          else
            local full = redis.call('GET', KEYS[i])
            if full ~= row then
              newer = #row > #full
              for at = 1, math.min(#row, #full) do
                local a, b = string.byte(row, at), string.byte(full, at)
                if a ~= b then newer = a > b break end
              end
            end
          end
        end
      end
    end
    if newer then
      if ttl > 0 then
        local extra = 0
        if jitter > 0 then extra = (seed + i * 2654435761) % (jitter + 1) end
        redis.call('SET', KEYS[i], row, 'PX', string.format('%.0f', ttl + extra))
      else
        redis.call('SET', KEYS[i], row)
      end
      verdict = '1'
    end
  end
  out[i] = verdict
end
return table.concat(out)
""")

# KEYS: a row, its entity's erasure mark, sets of fingerprints. ARGV: SHA-1 of the row that was read ('' = none), the mark that was read
# ('' = none), the new row, its time to live, that of the sets (it is never shortened), ms; then for each set how many fingerprints, and these.
# Answers 1, or 0 where row or mark are no longer what was read.
SWAP: Final = Script(b"""
local mark = redis.call('GET', KEYS[2]) or ''
local old = redis.call('GET', KEYS[1])
if mark ~= ARGV[2] then return 0 end
if old then
  if ARGV[1] == '' or redis.sha1hex(old) ~= ARGV[1] then return 0 end
elseif ARGV[1] ~= '' then
  return 0
end
local ttl = tonumber(ARGV[4])
if ttl > 0 then redis.call('SET', KEYS[1], ARGV[3], 'PX', ttl) else redis.call('SET', KEYS[1], ARGV[3]) end
local at = 6
for k = 3, #KEYS do
  local last = at + tonumber(ARGV[at])
  for first = at + 1, last, 1000 do
    redis.call('SADD', KEYS[k], unpack(ARGV, first, math.min(first + 999, last)))
  end
  local kept = tonumber(ARGV[5])
  if kept > 0 and redis.call('PTTL', KEYS[k]) < kept then redis.call('PEXPIRE', KEYS[k], ARGV[5]) end
  at = last + 1
end
return 1
""")

# KEYS: the names of all replicas, a key that is there while these may not be complete, what one replica says. ARGV: its name, what it says;
# how long that stays, and how long names are not complete where there were none, ms.
ANNOUNCE: Final = Script(b"""
if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('SET', KEYS[2], '', 'PX', ARGV[4]) end
redis.call('SADD', KEYS[1], ARGV[1])
redis.call('SET', KEYS[3], ARGV[2], 'PX', ARGV[3])
return 1
""")

# KEYS: an erasure mark, then every key of the entity. ARGV: until when events are refused (i64 LE, microseconds).
# Answers how many keys were removed. An older erasure never lowers a mark.
ERASE: Final = Script(b"""
local mark = redis.call('GET', KEYS[1])
local newer = true
if mark then
  local nl, nh = struct.unpack('<I4i4', ARGV[1])
  local ml, mh = struct.unpack('<I4i4', mark)
  newer = nh > mh or (nh == mh and nl > ml)
end
if newer then redis.call('SET', KEYS[1], ARGV[1]) end
local removed = 0
for i = 2, #KEYS do removed = removed + redis.call('DEL', KEYS[i]) end
return removed
""")
