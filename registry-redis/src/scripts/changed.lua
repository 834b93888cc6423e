-- KEYS: records and expiry of each service. ARGV: the head that the caller has of each. Answers {now, when to look again
-- or false}, and then the positions, from 0, of the services that changed, or that somebody has to look at.
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local out, due = {now, false}, math.huge
for i = 1, #KEYS, 2 do
  local m = redis.call('HMGET', KEYS[i], '~head', '~seen', '~safe', '~ttl')
  local at = math.huge
  if (m[1] or '-') ~= ARGV[(i + 1) / 2] then at = 0
  elseif m[2] then
    at = tonumber(m[2]) + math.max((tonumber(m[4]) or 0) / 3, 250)
    local nearest = redis.call('ZRANGEBYSCORE', KEYS[i + 1], '-inf', '(+inf', 'WITHSCORES', 'LIMIT', 0, 1)
    if nearest[2] then at = math.min(at, math.max(tonumber(nearest[2]), tonumber(m[3]) or 0)) end
  end
  if at <= now then out[#out + 1] = (i - 1) / 2 else due = math.min(due, at) end
end
if due < math.huge then out[2] = math.ceil(due) end
return out
